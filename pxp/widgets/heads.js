import { announcer, answers, choice, group, html, number, replace, svg, table } from "./kit.js";

/** Heads of a vision transformer: where they look, their relevance, and the logits without one or two of them. */

/** Numbers of 16 bits (base64) in hundredths. */
function hundredths(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true) / 100);
}

/** Where the logits without heads a < b stand: first all heads, then each alone, then pairs in order. */
function place(gone, heads) {
  if (gone.length === 0) return 0;
  if (gone.length === 1) return 1 + gone[0];
  const [a, b] = gone;
  return 1 + heads + a * heads - (a * (a + 1)) / 2 + (b - a - 1);
}

/** Answer { logits } to state { image, gone }: at most `data.most` heads can be gone in a page. */
export function compute(data, state) {
  const gone = [...state.gone].sort((a, b) => a - b);
  if (gone.length > data.most) throw new Error(`at most ${data.most} heads can be away here`);
  const classes = data.classes.length;
  const heads = data.blocks * data.heads;
  const each = (1 + heads + (heads * (heads - 1)) / 2) * classes;
  const all = hundredths(data.logits);
  const from = state.image * each + place(gone, heads) * classes;
  return { logits: Array.from(all.subarray(from, from + classes)) };
}

const best = (values) => values.indexOf(Math.max(...values));

/** The patches that a head's class token looks at, as a small picture. */
function looks(weights, side) {
  const most = Math.max(...weights);
  const picture = svg("svg", { viewBox: `0 0 ${side} ${side}`, "aria-hidden": "true", class: "pxp-looks" });
  weights.forEach((weight, k) => {
    const level = Math.round(255 * (weight / most));
    picture.append(
      svg("rect", { x: k % side, y: Math.floor(k / side), width: 1.02, height: 1.02, style: `fill: rgb(${level} ${level} ${level})` }),
    );
  });
  return picture;
}

/** A square whose filled part is the size of a head's relevance; + and − say its sign. */
function share(value, most) {
  const size = Math.sqrt(Math.abs(value) / most);
  return svg(
    "svg",
    { viewBox: "0 0 10 10", "aria-hidden": "true", class: "pxp-looks" },
    svg("rect", { x: 5 - 5 * size, y: 5 - 5 * size, width: 10 * size, height: 10 * size, style: `fill: var(--c${value < 0 ? 0 : 1})` }),
    svg("text", { x: 5, y: 7.6, "text-anchor": "middle", style: "font-size: 8px" }, value < 0 ? "−" : "+"),
  );
}

function render({ model, el }) {
  const data = model.get("data");
  const state = structuredClone(data.start);
  const bytes = Uint8Array.from(atob(data.images), (letter) => letter.charCodeAt(0));
  const [grid, bars, says, picture] = [html("div"), html("div"), announcer(), html("canvas", { class: "pxp-picture", role: "img" })];
  const most = model.get("live") ? Infinity : data.most;
  let [view, focus, refused] = ["attention", 0, false];

  const ask = answers(model, compute, ({ logits }) => {
    const whole = data.whole[state.image];
    const rows = data.classes.map((name, i) => [name, number(whole[i]), number(logits[i]), number(logits[i] - whole[i])]);
    replace(bars, table("Logits", ["class", "all heads", "now", "change"], rows));
    const names = state.gone.map((h) => `${1 + Math.floor(h / data.heads)}.${1 + (h % data.heads)}`);
    const said = data.classes[best(logits)];
    const target = best(whole);
    says.say(
      (refused ? `Only ${most} heads can be away at a time on this page. ` : "") +
        (names.length ? `Without head ${names.join(" and ")}` : "With all heads") +
        ` the network says ${said}; the logit of ${data.classes[target]} is ${number(logits[target])} (${number(logits[target] - whole[target])}).`,
    );
  });

  function toggled(head) {
    const at = state.gone.indexOf(head);
    refused = at < 0 && state.gone.length >= most;
    if (at >= 0) state.gone.splice(at, 1);
    else if (!refused) state.gone.push(head);
    draw();
    ask(state);
  }

  function moved(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: data.heads, ArrowUp: -data.heads }[event.key];
    const heads = data.blocks * data.heads;
    if (!step || focus + step < 0 || focus + step >= heads) return;
    event.preventDefault();
    focus += step;
    draw();
  }

  function draw() {
    const relevance = data.relevance[state.image];
    const largest = Math.max(...relevance.map(Math.abs));
    const patches = data.side ** 2;
    const within = grid.contains(document.activeElement);
    const buttons = relevance.map((value, head) => {
      const [block, of] = [1 + Math.floor(head / data.heads), 1 + (head % data.heads)];
      const gone = state.gone.includes(head);
      const from = (state.image * data.blocks * data.heads + head) * patches;
      const attention = Array.from(data.attention.subarray(from, from + patches));
      return html(
        "button",
        {
          type: "button",
          class: `pxp-head${gone ? " pxp-gone" : ""}`,
          "aria-pressed": String(gone),
          "aria-label": `Head ${block}.${of}, relevance ${number(value)}${gone ? ", away" : ""}`,
          tabindex: head === focus ? 0 : -1,
          onclick: () => {
            focus = head;
            toggled(head);
          },
        },
        view === "attention" ? looks(attention, data.side) : share(value, largest),
      );
    });
    const rows = Array.from({ length: data.blocks }, (_, b) =>
      html("div", { class: "pxp-row" }, html("span", { "aria-hidden": "true" }, `${b + 1}`), ...buttons.slice(b * data.heads, (b + 1) * data.heads)),
    );
    replace(grid, html("div", { role: "group", "aria-label": "Heads by block; press one to take it away", onkeydown: moved }, ...rows));
    if (within) buttons[focus].focus();
    paint();
  }

  function paint() {
    const size = data.pixels ** 2;
    picture.width = picture.height = data.pixels;
    const context = picture.getContext("2d");
    const drawn = context.createImageData(data.pixels, data.pixels);
    bytes.subarray(state.image * size, (state.image + 1) * size).forEach((v, k) => drawn.data.set([v, v, v, 255], 4 * k));
    context.putImageData(drawn, 0, 0);
    picture.setAttribute("aria-label", `Image of class ${data.classes[data.labels[state.image]]}`);
  }

  const images = data.labels.map((label, i) => [String(i), `${i + 1}: ${data.classes[label]}`]);
  const views = [["attention", "where the class token looks"], ["relevance", "relevance of the head"]];
  const controls = html(
    "div",
    { class: "pxp-controls" },
    group(
      "Show",
      choice("image", images, String(state.image), (value) => {
        state.image = Number(value);
        draw();
        ask(state);
      }),
      choice("squares", views, view, (value) => {
        view = value;
        draw();
      }),
    ),
    group("Image", picture),
  );
  const note = html("p", { class: "pxp-note" }, "Rows are blocks, from the input to the output. A white patch is looked at most. Relevance is that of the whole network, for what it says.");
  el.classList.add("pxp");
  replace(el, controls, ...says.nodes, grid, note, bars);
  draw();
  ask(state);
}

/** Attention comes as bytes; they are unpacked once. */
function opened(model) {
  const data = { ...model.get("data") };
  data.attention = Uint8Array.from(atob(data.attention), (letter) => letter.charCodeAt(0));
  return {
    get: (name) => (name === "data" ? data : model.get(name)),
    set: (name, value) => model.set(name, value),
    save_changes: () => model.save_changes(),
    on: (event, heard) => model.on(event, heard),
  };
}

export default { render: ({ model, el }) => render({ model: opened(model), el }) };
