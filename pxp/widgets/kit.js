/**
 * Building blocks of the explorers: elements, controls, tables, charts, and who computes.
 *
 * An explorer is a module whose default export has `render({ model, el })`, anywidget's contract. Python puts the text of
 * this file in front of each of them (see page.py), so every explorer stands alone wherever it is shown.
 */

/** A new HTML element; `on…` attributes are listeners, `false` and `null` leave an attribute out. */
export function html(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** A new SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** A number as text: `digits` after the point, a real minus sign, no −0. */
export function number(value, digits = 2) {
  const text = Math.abs(value).toFixed(digits);
  return value < 0 && Number(text) !== 0 ? `−${text}` : text;
}

let counted = 0;

/** A slider with its label and its value; calls `moved` with the number while it moves. */
export function slider(label, { min, max, step, value, show = (x) => number(x) }, moved) {
  const id = `pxp-${(counted += 1)}`;
  const output = html("output", { for: id }, show(value));
  const input = html("input", {
    id,
    type: "range",
    min,
    max,
    step,
    value,
    "aria-valuetext": show(value),
    oninput: () => {
      const now = Number(input.value);
      output.textContent = show(now);
      input.setAttribute("aria-valuetext", show(now));
      moved(now);
    },
  });
  return html("div", { class: "pxp-slider" }, html("label", { for: id }, label), input, output);
}

/** A list of which one is chosen; `options` are [value, text] pairs. Calls `chosen` with the value. */
export function choice(label, options, value, chosen) {
  const id = `pxp-${(counted += 1)}`;
  const list = html("select", { id, onchange: () => chosen(list.value) });
  for (const [each, text] of options) list.append(html("option", { value: each, selected: each === value }, text));
  return html("div", { class: "pxp-choice" }, html("label", { for: id }, label), list);
}

/** A box to tick. */
export function tick(label, value, changed) {
  const box = html("input", { type: "checkbox", checked: value, onchange: () => changed(box.checked) });
  return html("label", { class: "pxp-tick" }, box, label);
}

/** Controls that belong together. */
export function group(legend, ...controls) {
  return html("fieldset", {}, html("legend", {}, legend), ...controls);
}

/** A table; the first column holds the rows' names. */
export function table(caption, head, rows) {
  const cells = ([first, ...rest]) =>
    html("tr", {}, html("th", { scope: "row" }, first), ...rest.map((text) => html("td", {}, text)));
  return html(
    "div",
    { class: "pxp-wide", tabindex: 0, role: "group", "aria-label": caption },
    html(
      "table",
      {},
      html("caption", {}, caption),
      html("thead", {}, html("tr", {}, ...head.map((text) => html("th", { scope: "col" }, text)))),
      html("tbody", {}, ...rows.map(cells)),
    ),
  );
}

/** A sentence that says what is shown; it is read out, politely, when it has come to rest. */
export function announcer() {
  const shown = html("p", { class: "pxp-says" });
  const heard = html("p", { class: "pxp-unseen", role: "status", "aria-live": "polite" });
  let rest = null;
  const say = (text) => {
    shown.textContent = text;
    clearTimeout(rest);
    rest = setTimeout(() => (heard.textContent = text), 600);
  };
  return { nodes: [shown, heard], say };
}

/** Instead of what is there. */
export function replace(place, ...nodes) {
  place.replaceChildren(...nodes);
}

/** Tells the model what the controls say; gives a copy that stays as it is. */
export function told(model, state) {
  const asked = structuredClone(state);
  model.set("state", asked);
  model.save_changes();
  return asked;
}

/**
 * Who computes: `compute(data, state)` here in the page, or Python, where a kernel listens to the state.
 *
 * Gives a function of the state; `show` gets the answer and the state that it answers.
 */
export function answers(model, compute, show) {
  if (!model.get("live")) return (state) => show(compute(model.get("data"), state), told(model, state));
  model.on("change:answer", () => show(model.get("answer"), model.get("state")));
  return (state) => told(model, state);
}

const DASHES = ["", "7 4", "2 4", "9 3 2 3", "4 2"];

/**
 * A chart of shares with intervals, against shares: `lines` are { name, x, mean, low, high }, in [0, 1]; `at` marks one
 * place of x. Lines differ in dashes, so that no one needs the colours.
 */
export function chart({ lines, at, left, bottom }) {
  const [width, height, x0, y0, right, top] = [360, 250, 44, 208, 10, 10];
  const xs = lines.flatMap((line) => line.x);
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const across = (x) => x0 + ((x - first) / (last - first)) * (width - right - x0);
  const up = (y) => y0 - y * (y0 - top);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "pxp-chart", "aria-hidden": "true" });
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const y = up(part);
    picture.append(svg("line", { x1: x0, x2: width - right, y1: y, y2: y, class: "pxp-grid" }));
    picture.append(svg("text", { x: x0 - 6, y: y + 4, "text-anchor": "end" }, `${100 * part}`));
  }
  for (const x of [0, 0.2, 0.4, 0.6, 0.8, 1].filter((each) => each >= first && each <= last)) {
    picture.append(svg("text", { x: across(x), y: y0 + 17, "text-anchor": "middle" }, `${Math.round(100 * x)}`));
  }
  picture.append(svg("text", { x: (x0 + width - right) / 2, y: height - 6, "text-anchor": "middle" }, bottom));
  picture.append(
    svg("text", { x: 12, y: (y0 + top) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(y0 + top) / 2})` }, left),
  );
  if (at !== undefined) picture.append(svg("line", { x1: across(at), x2: across(at), y1: top, y2: y0, class: "pxp-at" }));
  lines.forEach((line, index) => {
    if (line.low) {
      const there = line.x.map((x, i) => `${across(x)},${up(line.high[i])}`);
      const back = line.x.map((x, i) => `${across(x)},${up(line.low[i])}`).reverse();
      picture.append(svg("polygon", { points: [...there, ...back].join(" "), class: `pxp-band pxp-c${index}` }));
    }
    const points = line.x.map((x, i) => `${across(x)},${up(line.mean[i])}`).join(" ");
    picture.append(
      svg("polyline", { points, class: `pxp-line pxp-c${index}`, "stroke-dasharray": DASHES[index % DASHES.length] }),
    );
  });
  return picture;
}

/** What the lines of a chart look like. */
export function key(names) {
  const entry = (name, index) =>
    html(
      "li",
      {},
      svg(
        "svg",
        { viewBox: "0 0 34 10", width: 34, height: 10, "aria-hidden": "true" },
        svg("line", { x1: 0, x2: 34, y1: 5, y2: 5, class: `pxp-line pxp-c${index}`, "stroke-dasharray": DASHES[index] }),
      ),
      name,
    );
  return html("ul", { class: "pxp-key" }, ...names.map(entry));
}
