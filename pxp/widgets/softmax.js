import { announcer, answers, group, html, number, replace, slider, table } from "./kit.js";

/** Chapter 7's small numbers: a softmax with three keys under three rules, and a LayerNorm under two. */

const STABLE = 1e-9; // pxp's stabiliser of the softmax's z⁺

const total = (values) => values.reduce((sum, x) => sum + x, 0);
const positive = (x) => Math.max(x, 0);
const away = (x, epsilon) => x + (x < 0 ? -epsilon : epsilon);

/**
 * One query over keys: state { x, v } has logits and values; relevance of both under each rule.
 */
function attend({ x, v }) {
  const top = Math.max(...x);
  const raised = x.map((each) => Math.exp(each - top));
  const s = raised.map((each) => each / total(raised));
  const output = total(s.map((each, i) => each * v[i]));
  const half = s.map((each, i) => (each * v[i]) / 2);
  const parts = s.map((sj, j) => x.map((xi, i) => sj * ((i === j ? 1 : 0) - s[i]) * xi));
  const support = x.map((_, i) =>
    total(
      parts.map((row, j) => {
        const constant = s[j] - total(row);
        const whole = away(total(row.map(positive)) + positive(constant), STABLE);
        return (positive(row[i]) / whole) * half[j];
      }),
    ),
  );
  const rules = [
    { rule: "AttnLRP", logits: x.map((xi, i) => xi * (half[i] - s[i] * total(half))), values: half },
    { rule: "CP-LRP", logits: x.map(() => 0), values: half.map((r) => 2 * r) },
    { rule: "z⁺", logits: support, values: half },
  ];
  return { weights: s, output, rules };
}

/** Six numbers through a LayerNorm, read out with fixed weights: state { y } and data { readout }. */
function normalise(y, readout) {
  const mean = total(y) / y.length;
  const spread = Math.sqrt(total(y.map((each) => (each - mean) ** 2)) / y.length + 1e-12);
  const normal = y.map((each) => (each - mean) / spread);
  const output = total(normal.map((each, i) => each * readout[i]));
  const average = total(readout) / readout.length;
  const held = y.map((each, i) => (each * (readout[i] - average)) / spread);
  const free = y.map((each, i) => (each * (readout[i] - average - (normal[i] * output) / y.length)) / spread);
  return { output, free, held };
}

/** Answer { softmax, norm } to state { x, v, y }. */
export function compute(data, state) {
  return { softmax: attend(state), norm: normalise(state.y, data.readout) };
}

function render({ model, el }) {
  const data = model.get("data");
  const state = structuredClone(data.start);
  const [softmax, norm, says, more] = [html("div"), html("div"), announcer(), announcer()];
  const ask = answers(model, compute, (answer) => {
    const keys = state.x.map((_, i) => `key ${i + 1}`);
    const rows = answer.softmax.rules.map(({ rule, logits, values }) => {
      return [rule, ...[...logits, ...values, total(logits) + total(values)].map((r) => number(r))];
    });
    const head = ["rule", ...keys.map((key) => `logit, ${key}`), ...keys.map((key) => `value, ${key}`), "sum"];
    replace(softmax, table("Relevance of logits and values", head, rows));
    const sums = answer.softmax.rules.map(({ rule, logits, values }) => `${rule} ${number(total(logits) + total(values))}`);
    const weights = answer.softmax.weights.map((s) => number(s)).join(", ");
    says.say(`Weights ${weights}; output ${number(answer.softmax.output)}. Sums: ${sums.join(", ")}.`);
    const line = (name, values) => [name, ...[...values, total(values)].map((r) => number(r))];
    replace(
      norm,
      table("Relevance of six numbers that enter a LayerNorm", ["", ..."123456", "sum"], [
        line("gradient × input", answer.norm.free),
        line("deviation held constant", answer.norm.held),
      ]),
    );
    more.say(
      `Output ${number(answer.norm.output)}. Gradient × input sums to ${number(total(answer.norm.free))}, ` +
        `with a constant deviation to ${number(total(answer.norm.held))}.`,
    );
  });
  const control = (list, i, label, most) =>
    slider(label, { min: -most, max: most, step: 0.1, value: list[i] }, (value) => {
      list[i] = value;
      ask(state);
    });
  const all = (list, label, most) => list.map((_, i) => control(list, i, label(i), most));
  el.classList.add("pxp");
  replace(
    el,
    ...says.nodes,
    softmax,
    html(
      "div",
      { class: "pxp-controls" },
      group("Logits", ...all(state.x, (i) => `key ${i + 1}`, 3)),
      group("Values", ...all(state.v, (i) => `key ${i + 1}`, 8)),
    ),
    ...more.nodes,
    norm,
    html("div", { class: "pxp-controls" }, group("Numbers that enter the LayerNorm", ...all(state.y, (i) => `number ${i + 1}`, 5))),
    html("p", { class: "pxp-note" }, `They are read out with the weights ${data.readout.map((w) => number(w, 0)).join(", ")}.`),
  );
  ask(state);
}

export default { render };
