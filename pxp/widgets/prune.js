import { announcer, answers, chart, choice, group, html, key, number, replace, slider, table, tick, told } from "./kit.js";
import { forward, halves, heatmap, measured, network, pruned, unpacked } from "./vgg.js";

/** The shipped VGG, pruned in the page: choose, cut, repair, look. */

/** What is made of the data once: the network and the images. */
export function opened(data) {
  const bytes = unpacked(data.images);
  const size = data.side ** 2;
  return {
    net: data.weights ? network(data.layout, halves(data.weights)) : null,
    images: data.labels.map((_, i) => Float32Array.from(bytes.subarray(i * size, (i + 1) * size), (value) => value / 255)),
  };
}

/** The kept filters of each layer: bits of a mask, layer by layer, the first bit first. */
function kept(data, { criterion, control, scope, step }) {
  const all = unpacked(data.masks[criterion][control ? "shuffled" : "own"][scope]);
  const total = data.sizes.reduce((sum, size) => sum + size, 0);
  const start = step * Math.ceil(total / 8);
  let bit = 0;
  return data.sizes.map((size) => {
    const rows = [];
    for (let j = 0; j < size; j += 1, bit += 1) if ((all[start + (bit >> 3)] >> (bit & 7)) & 1) rows.push(j);
    return rows;
  });
}

const best = (logits) => logits.indexOf(Math.max(...logits));

/** The image that is looked at: one of the list, or `pixels` that were drawn. */
const chosen = (images, state) => (state.pixels ? Float32Array.from(state.pixels) : images[state.image]);

/** The pruned network of a state; yields now and then while BatchNorm is measured anew. */
function* cut({ net, images }, data, state) {
  const rows = kept(data, state);
  const norms = state.repair ? yield* measured(net, rows, images) : undefined;
  return pruned(net, rows, norms);
}

function finish(generator) {
  for (;;) {
    const { done, value } = generator.next();
    if (done) return value;
  }
}

/** The pruned network of a state, at once. */
export const settled = (all, data, state) => finish(cut(all, data, state));

function seen(small, image, state) {
  const logits = Array.from(forward(small, image));
  const target = best(logits);
  return { logits, target, heat: Array.from(heatmap(small, image, target, state.rule)) };
}

/**
 * Answer { kept, logits, target, heat, right } to state { criterion, control, scope, step, repair, rule, image, pixels }.
 *
 * kept counts the filters of each layer, right the images whose label comes out; the page computes it bit by bit.
 */
export function compute(data, state) {
  const all = opened(data);
  const small = settled(all, data, state);
  const right = all.images.filter((image, i) => best(Array.from(forward(small, image))) === data.labels[i]).length;
  const counts = small.convolutions.map(({ outputs }) => outputs);
  return { kept: counts, ...seen(small, chosen(all.images, state), state), right };
}

/** Computes in the page, a little at a time; a new state stops the old one, and `el` is busy meanwhile. */
function stepwise(model, el, show) {
  const data = model.get("data");
  const all = opened(data);
  let running = 0;
  return (state) => {
    running += 1;
    const mine = running;
    const asked = told(model, state);
    const work = (function* () {
      const small = yield* cut(all, data, asked);
      const answer = { kept: small.convolutions.map(({ outputs }) => outputs), ...seen(small, chosen(all.images, asked), asked) };
      show({ ...answer, right: null }, asked);
      yield;
      let [right, spent] = [0, 0];
      for (const [i, image] of all.images.entries()) {
        const start = performance.now();
        const logits = Array.from(forward(small, image));
        spent += performance.now() - start;
        right += best(logits) === data.labels[i];
        if (i % 4 === 3) yield;
      }
      show({ ...answer, right, milliseconds: spent / all.images.length }, asked);
    })();
    el.setAttribute("aria-busy", "true");
    const go = () => {
      const until = performance.now() + 12;
      while (mine === running) {
        if (work.next().done) return void el.removeAttribute("aria-busy");
        if (performance.now() > until) return void setTimeout(go);
      }
    };
    go();
  };
}

const BLUE = [0, 114, 178];
const ORANGE = [213, 94, 0];

/** An image or a heatmap on a canvas: grey, or blue where relevance is negative, orange where it is positive. */
function painted(canvas, values, side, heat) {
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(side, side);
  const most = heat ? Math.max(...values.map(Math.abs)) || 1 : 1;
  values.forEach((value, k) => {
    const [r, g, b] = heat
      ? (value < 0 ? BLUE : ORANGE).map((c) => 255 - (255 - c) * Math.sqrt(Math.abs(value) / most))
      : [255 * value, 255 * value, 255 * value];
    picture.data.set([r, g, b, 255], 4 * k);
  });
  context.putImageData(picture, 0, 0);
}

/** A field to draw on with the pointer; calls `drawn` with its side² values. */
function sketch(side, drawn) {
  const canvas = html("canvas", { width: side, height: side, class: "pxp-picture", role: "img", "aria-label": "Field to draw on with the pointer" });
  const pixels = Array.from({ length: side * side }, () => 0);
  const brush = ({ clientX, clientY, buttons }) => {
    if (!buttons) return;
    const box = canvas.getBoundingClientRect();
    const [x, y] = [((clientX - box.left) / box.width) * side, ((clientY - box.top) / box.height) * side];
    for (let k = 0; k < pixels.length; k += 1) {
      const apart = Math.hypot((k % side) + 0.5 - x, Math.floor(k / side) + 0.5 - y);
      pixels[k] = Math.max(pixels[k], Math.min(1, Math.max(0, 2.6 - apart)));
    }
    painted(canvas, pixels, side, false);
    drawn(pixels);
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    brush(event);
  });
  canvas.addEventListener("pointermove", brush);
  const clear = html("button", { type: "button", onclick: () => painted(canvas, pixels.fill(0), side, false) || drawn(null) }, "Clear the drawing");
  painted(canvas, pixels, side, false);
  return html("div", {}, canvas, html("div", {}, clear));
}

function layers(sizes, counts) {
  const rows = sizes.map((size, index) => [`convolution ${index + 1}`, `${counts[index]} of ${size}`, `${Math.round((100 * counts[index]) / size)} %`]);
  return table("Filters kept", ["layer", "filters", "share"], rows);
}

/** The stored curve of what is chosen, if it was measured. */
function stored(data, { criterion, control, scope, repair }) {
  return data.curves[control ? `${criterion}, shuffled` : criterion]?.[scope]?.[repair ? "statistics" : "none"];
}

function render({ model, el }) {
  const data = model.get("data");
  const state = structuredClone(data.start);
  const classes = data.classes;
  const [graph, counts, says] = [html("div"), html("div"), announcer()];
  const [image, heat] = ["Image", "Relevance of its pixels"].map((label) =>
    html("canvas", { class: "pxp-picture", role: "img", "aria-label": label }),
  );
  const [legend, speed] = [html("p", { class: "pxp-note" }), html("p", { class: "pxp-note" })];
  const bytes = unpacked(data.images);
  const size = data.side ** 2;

  function show(answer, asked) {
    const rate = data.rates[asked.step];
    const share = (right) => `${((100 * right) / data.labels.length).toFixed(1)} %`;
    replace(counts, layers(data.sizes, answer.kept));
    const pixels = asked.pixels ?? Array.from(bytes.subarray(asked.image * size, (asked.image + 1) * size), (v) => v / 255);
    painted(image, pixels, data.side, false);
    painted(heat, answer.heat, data.side, true);
    const said = classes[answer.target];
    image.setAttribute("aria-label", asked.pixels ? "Your drawing" : `Image of class ${classes[data.labels[asked.image]]}`);
    heat.setAttribute("aria-label", `Relevance of its pixels for ${said}, orange for and blue against`);
    const sum = answer.heat.reduce((a, b) => a + b, 0);
    legend.textContent =
      `The network says ${said} (logit ${number(answer.logits[answer.target])}). ` +
      `Orange speaks for it, blue against; the pixels' relevance sums to ${number(sum)}.`;
    const line = stored(data, asked);
    const lines = line ? [{ name: "2,000 images, stored", x: line.rates, ...line }] : [];
    const on = line?.rates.indexOf(rate) ?? -1;
    const beside = on >= 0 ? `, ${(100 * line.mean[on]).toFixed(1)} % of the stored 2,000` : "";
    const now = answer.right === null ? "…" : `${share(answer.right)} of ${data.labels.length} images${beside}`;
    says.say(`${Math.round(100 * rate)} % of the filters pruned. Right: ${now}. The chosen image: ${said}.`);
    if (answer.milliseconds) speed.textContent = `A forward pass took ${number(answer.milliseconds, 1)} ms in your browser.`;
    if (!line) replace(graph, html("p", { class: "pxp-note" }, "For this combination no curve on 2,000 images is stored."));
    else replace(graph, chart({ lines, at: rate, left: "accuracy (%)", bottom: "pruned (%)" }), key(lines.map(({ name }) => name)));
  }

  const ask = model.get("live") ? answers(model, compute, show) : stepwise(model, el, show);
  const change = (name) => (value) => {
    state[name] = value;
    ask(state);
  };
  const rates = { min: 0, max: data.rates.length - 1, step: 1, value: state.step, show: (i) => `${Math.round(100 * data.rates[i])} %` };
  const names = data.labels.map((label, i) => [String(i), `${i + 1}: ${classes[label]}`]);
  const controls = html(
    "div",
    { class: "pxp-controls" },
    group(
      "What goes",
      slider("pruned", rates, change("step")),
      choice("criterion", Object.keys(data.masks).map((name) => [name, data.names[name] ?? name]), state.criterion, change("criterion")),
      choice("ranked", [["global", "over all layers"], ["layer", "within each layer"]], state.scope, change("scope")),
      tick("shuffled within layers (control)", state.control, change("control")),
      tick("repair: BatchNorm anew, on these images without labels", state.repair, change("repair")),
    ),
    group(
      "What is looked at",
      choice("image", names, String(state.image), (value) => {
        state.pixels = null;
        change("image")(Number(value));
      }),
      choice("heatmap", [["epsilon", "LRP-ε"], ["zplus", "LRP-z⁺"]], state.rule, change("rule")),
    ),
  );
  const pictures = html(
    "div",
    { class: "pxp-pictures" },
    html("figure", {}, image, html("figcaption", {}, "image")),
    html("figure", {}, heat, html("figcaption", {}, "relevance")),
    html("figure", {}, sketch(data.side, change("pixels")), html("figcaption", {}, "or draw one")),
  );
  el.classList.add("pxp");
  replace(el, controls, ...says.nodes, pictures, legend, graph, counts, speed);
  ask(state);
}

export default { render };
