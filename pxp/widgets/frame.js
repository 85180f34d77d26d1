/**
 * Starts an explorer in a frame without a kernel: its data stand in the page, and it computes by itself.
 *
 * Python puts the explorer's own text in front (`explorer` is its default export).
 */

/** The part of anywidget's model that an explorer needs. */
function still(data) {
  const held = { data, live: false, state: data.start };
  return { get: (name) => held[name], set: (name, value) => (held[name] = value), save_changes() {}, on() {} };
}

/** The element of this frame in the page around it, where the page lets us see it. */
function around() {
  try {
    return window.frameElement;
  } catch {
    return null; // of another origin, as in a notebook's sandbox
  }
}

/** As high as what it holds. */
function fit(frame) {
  const size = () => (frame.style.height = `${document.documentElement.offsetHeight}px`);
  new ResizeObserver(size).observe(document.documentElement);
}

/** Dark where the page is dark; alone, as the system is. */
function follow(frame) {
  const outer = frame?.ownerDocument.documentElement;
  const wished = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    document.documentElement.dataset.theme = outer?.dataset.theme ?? (wished.matches ? "dark" : "light");
  };
  if (outer) new MutationObserver(paint).observe(outer, { attributes: true, attributeFilter: ["data-theme"] });
  wished.addEventListener("change", paint);
  paint();
}

const frame = around();
follow(frame);
if (frame) {
  fit(frame);
  frame.closest(".cell")?.classList.add("pxp-moves"); // the page then hides the still
}
const model = still(JSON.parse(document.getElementById("data").textContent));
globalThis.pxp = { model }; // to look at in the console, and for the tests
explorer.render({ model, el: document.getElementById("explorer") });
