// Logits and both heatmaps of every image in the page, for one network: reads { data, states }, writes a list.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { opened, settled } = await import(pathToFileURL(`${process.argv[3]}/prune.js`));
const { forward, heatmap } = await import(pathToFileURL(`${process.argv[3]}/vgg.js`));
const { data, states } = JSON.parse(readFileSync(0, "utf8"));
const all = opened(data);
const found = states.map((state) => {
  const small = settled(all, data, state);
  const logits = all.images.map((image) => Array.from(forward(small, image)));
  const targets = logits.map((row) => row.indexOf(Math.max(...row)));
  const [epsilon, zplus] = ["epsilon", "zplus"].map((rule) => all.images.map((image, i) => Array.from(heatmap(small, image, targets[i], rule))));
  return { logits, targets, epsilon, zplus };
});
process.stdout.write(JSON.stringify(found));
