import { announcer, answers, group, html, number, replace, slider, svg, table } from "./kit.js";

/** Chapter 2's network of six numbers: every weight a slider, all rules side by side. */

const STABLE = 1e-6; // pxp's stabiliser

const positive = (x) => Math.max(x, 0);
const negative = (x) => Math.min(x, 0);
const total = (values) => values.reduce((sum, x) => sum + x, 0);
const away = (x, epsilon) => x + (x < 0 ? -epsilon : epsilon); // zennit's: 0 counts as positive

/** What each input of one unit gets of the unit's relevance; `parts` are its contributions. */
const SHARES = {
  "LRP-0": (parts, bias) => parts.map((c) => divided(c, total(parts) + bias, 0)),
  "ε": (parts, bias, { epsilon }) => parts.map((c) => divided(c, total(parts) + bias, epsilon)),
  "γ": (parts, bias, { gamma }) => {
    const side = total(parts) + bias > 0 ? positive : negative;
    const more = (c) => c + gamma * side(c);
    const below = total(parts.map(more)) + more(bias);
    return parts.map((c) => divided(more(c), below, STABLE));
  },
  "αβ": (parts, bias, { alpha }) => {
    const [up, down] = [positive, negative].map((side) => total(parts.map(side)) + side(bias));
    return parts.map(
      (c) => alpha * divided(positive(c), up, STABLE) - (alpha - 1) * divided(negative(c), down, STABLE),
    );
  },
  "z⁺": (parts, bias) => {
    const up = total(parts.map(positive)) + positive(bias);
    return parts.map((c) => divided(positive(c), up, STABLE));
  },
};

function divided(part, whole, epsilon) {
  return whole === 0 && epsilon === 0 ? 0 : part / away(whole, epsilon);
}

/** One step down: units' relevance, by the rule, to their inputs. */
function down(share, inputs, weights, biases, relevance, options) {
  const found = inputs.map(() => 0);
  weights.forEach((row, j) => {
    if (relevance[j] === 0) return;
    const parts = share(inputs.map((a, i) => a * row[i]), biases[j], options);
    parts.forEach((part, i) => (found[i] += part * relevance[j]));
  });
  return found;
}

/**
 * Output and relevance of the network x → ReLU(W x + b) → w h + c.
 *
 * state: { x, first, bias, second, last, gamma, epsilon, alpha }; answer: { hidden, output, rules }, rules a list of
 * { rule, middle, inputs }: the relevance of hidden units and inputs.
 */
export function compute(_, state) {
  const hidden = state.first.map((row, j) => positive(total(row.map((w, i) => w * state.x[i])) + state.bias[j]));
  const output = total(hidden.map((h, j) => h * state.second[j])) + state.last;
  const rules = Object.entries(SHARES).map(([rule, share]) => {
    const middle = down(share, hidden, [state.second], [state.last], [output], state);
    return { rule, middle, inputs: down(share, state.x, state.first, state.bias, middle, state) };
  });
  return { hidden, output, rules };
}

function network(state, answer) {
  const places = { x: [[50, 50], [50, 150]], h: [[190, 50], [190, 150]], y: [[330, 100]] };
  const picture = svg("svg", { viewBox: "0 0 380 200", class: "pxp-chart", "aria-hidden": "true" });
  const edge = ([x1, y1], [x2, y2], weight) =>
    svg("line", {
      x1,
      y1,
      x2,
      y2,
      class: `pxp-line pxp-c${weight < 0 ? 1 : 0}`,
      style: `stroke-width: ${0.6 + 1.6 * Math.abs(weight)}`,
      "stroke-dasharray": weight < 0 ? "6 4" : "",
    });
  state.first.forEach((row, j) => row.forEach((w, i) => picture.append(edge(places.x[i], places.h[j], w))));
  state.second.forEach((w, j) => picture.append(edge(places.h[j], places.y[0], w)));
  const node = ([x, y], name, value) => [
    svg("circle", { cx: x, cy: y, r: 27, style: "fill: var(--ground); stroke: var(--ink)" }),
    svg("text", { x, y: y - 4, "text-anchor": "middle" }, name),
    svg("text", { x, y: y + 13, "text-anchor": "middle" }, number(value)),
  ];
  places.x.forEach((at, i) => picture.append(...node(at, `x${"₁₂"[i]}`, state.x[i])));
  places.h.forEach((at, j) => picture.append(...node(at, `h${"₁₂"[j]}`, answer.hidden[j])));
  picture.append(...node(places.y[0], "y", answer.output));
  return picture;
}

function render({ model, el }) {
  const state = structuredClone(model.get("data").start);
  const [picture, numbers, says] = [html("div"), html("div"), announcer()];
  const ask = answers(model, compute, (answer) => {
    replace(picture, network(state, answer));
    const rows = answer.rules.map(({ rule, middle, inputs }) => {
      const sum = total(inputs);
      return [rule, ...middle, ...inputs, sum, answer.output - sum].map((x) => (x === rule ? x : number(x)));
    });
    const head = ["rule", "h₁", "h₂", "x₁", "x₂", "x sum", "missing"];
    replace(numbers, table("Relevance by rule", head, rows));
    const told = answer.rules.map(({ rule, inputs }) => `${rule} ${inputs.map((x) => number(x)).join(" and ")}`);
    says.say(`Output ${number(answer.output)}. The inputs get: ${told.join("; ")}.`);
  });
  const moved = (change) => (value) => {
    change(value);
    ask(state);
  };
  const range = (value, least = -4, most = 4) => ({ min: least, max: most, step: 0.25, value });
  const of = (list, i, name) => slider(name, range(list[i]), moved((value) => (list[i] = value)));
  const options = [
    slider("γ", { min: 0, max: 4, step: 0.05, value: state.gamma }, moved((value) => (state.gamma = value))),
    slider("ε", { min: 0, max: 2, step: 0.05, value: state.epsilon }, moved((value) => (state.epsilon = value))),
    slider("α (β = α − 1)", { min: 1, max: 4, step: 0.25, value: state.alpha }, moved((value) => (state.alpha = value))),
  ];
  const controls = html(
    "div",
    { class: "pxp-controls" },
    group("Inputs", of(state.x, 0, "x₁"), of(state.x, 1, "x₂")),
    group("Rules", ...options),
    group("Weights into h₁, and its bias", of(state.first[0], 0, "from x₁"), of(state.first[0], 1, "from x₂"), of(state.bias, 0, "bias")),
    group("Weights into h₂, and its bias", of(state.first[1], 0, "from x₁"), of(state.first[1], 1, "from x₂"), of(state.bias, 1, "bias")),
    group(
      "Weights into y, and its bias",
      of(state.second, 0, "from h₁"),
      of(state.second, 1, "from h₂"),
      slider("bias", range(state.last), moved((value) => (state.last = value))),
    ),
  );
  el.classList.add("pxp");
  replace(el, ...says.nodes, numbers, picture, controls);
  ask(state);
}

export default { render };
