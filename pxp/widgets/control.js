import { announcer, answers, chart, choice, group, html, key, replace, slider, table } from "./kit.js";

/** Where or which: accuracy against rate for a criterion, its shuffled control and chance, as cut and repaired. */

/** The lines to draw and the gaps at one rate: a part of the data, which Python has computed. */
export function compute(data, state) {
  const { rates, lines, gaps } = data.tasks[state.task][state.scope][state.repair];
  const names = ["LRP", "LRP, shuffled", "random"];
  if (state.other && state.other in lines) names.push(state.other);
  const at = rates.indexOf(state.rate);
  return {
    rates,
    lines: names.map((name) => ({ name, ...lines[name] })),
    where: gaps.where[at],
    which: gaps.which[at],
  };
}

const points = (x) => `${x < 0 ? "−" : "+"}${Math.abs(100 * x).toFixed(1)}`;
const interval = ([value, low, high]) => `${points(value)} [${points(low)}, ${points(high)}]`;

function render({ model, el }) {
  const { tasks, start, others, names } = model.get("data");
  const state = { ...start };
  const [picture, numbers, says, repairs, rate] = [html("div"), html("div"), announcer(), html("div"), html("div")];
  const ask = answers(model, compute, (answer) => {
    const at = answer.rates.indexOf(state.rate);
    const lines = answer.lines.map((line) => ({ ...line, x: answer.rates }));
    replace(
      picture,
      chart({ lines, at: state.rate, left: "accuracy (%)", bottom: "pruned (%)" }),
      key(lines.map(({ name }) => name)),
    );
    const head = ["", ...answer.rates.map((r) => `${Math.round(100 * r)} %`)];
    const rows = lines.map(({ name, mean }) => [name, ...mean.map((x) => (100 * x).toFixed(1))]);
    replace(numbers, table("Accuracy (%) by rate", head, rows));
    const reached = lines.map(({ name, mean }) => `${name} ${(100 * mean[at]).toFixed(1)} %`);
    says.say(
      `At ${Math.round(100 * state.rate)} % pruned: ${reached.join(", ")}. ` +
        `Where to prune adds ${interval(answer.where)} points over chance, which to prune ${interval(answer.which)}.`,
    );
  });
  const changed = (name) => (value) => {
    state[name] = value;
    settle();
  };
  // what was measured differs from task to task
  function settle() {
    const known = tasks[state.task][state.scope];
    if (!(state.repair in known)) state.repair = Object.keys(known)[0];
    const { rates } = known[state.repair];
    if (!rates.includes(state.rate)) state.rate = rates[0];
    const options = Object.keys(known).map((each) => [each, names[each]]);
    replace(repairs, choice("repair", options, state.repair, changed("repair")));
    ask(state);
  }
  const scopes = ["global", "layer"].map((each) => [each, names[each]]);
  const { rates } = tasks[state.task][state.scope][state.repair];
  const show = (i) => `${Math.round(100 * rates[i])} %`;
  const place = { min: 0, max: rates.length - 1, step: 1, value: rates.indexOf(state.rate), show };
  replace(rate, slider("pruned", place, (i) => changed("rate")(rates[i])));
  const controls = html(
    "div",
    { class: "pxp-controls" },
    group(
      "Network",
      choice("prune", Object.keys(tasks).map((each) => [each, names[each]]), state.task, changed("task")),
      choice("ranked", scopes, state.scope, changed("scope")),
    ),
    group(
      "After the cut",
      repairs,
      choice("beside", [["", "nothing more"], ...others.map((each) => [each, each])], state.other, changed("other")),
    ),
    group("Rate", rate),
  );
  el.classList.add("pxp");
  replace(el, controls, ...says.nodes, picture, numbers);
  settle();
}

export default { render };
