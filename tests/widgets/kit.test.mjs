// Node's own tests of what the explorers are made of: `node --test tests/widgets`.
import assert from "node:assert/strict";
import { test } from "node:test";

const widgets = new URL("../../pxp/widgets/", import.meta.url);
const { number } = await import(new URL("kit.js", widgets));
const vgg = await import(new URL("vgg.js", widgets));
const heads = await import(new URL("heads.js", widgets));

test("numbers have a real minus sign and no negative zero", () => {
  assert.equal(number(-1.234), "−1.23");
  assert.equal(number(-0.001), "0.00");
  assert.equal(number(2, 0), "2");
});

test("numbers of 16 bits", () => {
  const bits = [0x3c00, 0xc000, 0x0001, 0x7c00, 0x0000, 0x3555];
  const text = Buffer.from(Uint16Array.from(bits).buffer).toString("base64");
  const found = Array.from(vgg.halves(text));
  assert.deepEqual(found.slice(0, 5), [1, -2, Math.fround(2 ** -24), Infinity, 0]);
  assert.ok(Math.abs(found[5] - 1 / 3) < 1e-4);
});

/** Random numbers that are the same every time. */
function dice(size, seed = 1) {
  let state = seed;
  return Float32Array.from({ length: size }, () => ((state = (state * 16807) % 2147483647) / 2147483647) * 2 - 1);
}

const layout = { convolutions: [{ inputs: 1, outputs: 3, pool: true }, { inputs: 3, outputs: 2, pool: false }], linear: [[4, 2], [2, 4]] };
const size = 9 * 3 + 5 * 3 + 9 * 6 + 5 * 2 + 4 * 3 + 2 * 5;

function net(seed) {
  const numbers = dice(size, seed);
  const made = vgg.network(layout, numbers);
  for (const { norm } of made.convolutions) norm.variance.forEach((v, j) => (norm.variance[j] = Math.abs(v) + 0.5));
  return made;
}

/** The same, written as the formulas say. */
function naive({ convolutions, linear }, image, kept) {
  let planes = [Array.from({ length: 6 }, (_, y) => Array.from(image.subarray(6 * y, 6 * y + 6)))];
  convolutions.forEach((layer, index) => {
    planes = Array.from({ length: layer.outputs }, (_, j) =>
      planes[0].map((row, y) =>
        row.map((_, x) => {
          let sum = layer.bias[j];
          planes.forEach((plane, i) => {
            for (let tap = 0; tap < 9; tap += 1) {
              const value = plane[y + Math.floor(tap / 3) - 1]?.[x + (tap % 3) - 1] ?? 0;
              sum += value * layer.weight[9 * (j * layer.inputs + i) + tap];
            }
          });
          const { weight, bias, mean, variance } = layer.norm;
          const normal = ((sum - mean[j]) / Math.sqrt(variance[j] + 1e-5)) * weight[j] + bias[j];
          return kept[index].includes(j) ? Math.max(normal, 0) : 0;
        }),
      ),
    );
    if (layer.pool) {
      planes = planes.map((plane) =>
        Array.from({ length: 3 }, (_, y) =>
          Array.from({ length: 3 }, (_, x) => Math.max(plane[2 * y][2 * x], plane[2 * y][2 * x + 1], plane[2 * y + 1][2 * x], plane[2 * y + 1][2 * x + 1])),
        ),
      );
    }
  });
  let a = planes.map((plane) => plane.flat().reduce((s, v) => s + v, 0) / plane.flat().length);
  linear.forEach(({ weight, bias, inputs }, index) => {
    const z = Array.from(bias, (b, j) => a.reduce((s, v, i) => s + v * weight[j * inputs + i], b));
    a = index < linear.length - 1 ? z.map((v) => Math.max(v, 0)) : z;
  });
  return a;
}

for (const kept of [[[0, 1, 2], [0, 1]], [[1], [0, 1]], [[0, 2], [1]], [[], [0]]]) {
  test(`a pruned network gives what its formulas say: ${JSON.stringify(kept)}`, () => {
    for (const seed of [3, 5, 7]) {
      const image = dice(36, seed + 1).map(Math.abs);
      const found = vgg.forward(vgg.pruned(net(seed), kept), image);
      naive(net(seed), image, kept).forEach((value, j) => assert.ok(Math.abs(value - found[j]) < 1e-5));
    }
  });
}

test("relevance by ε is gradient × input, by finite differences", () => {
  const small = vgg.pruned(net(11), [[0, 1, 2], [0, 1]]);
  const image = dice(36, 4).map((x) => Math.abs(x) + 0.1);
  const heat = vgg.heatmap(small, image, 1, "epsilon");
  image.forEach((value, k) => {
    const moved = (step) => vgg.forward(small, image.map((x, i) => (i === k ? x + step : x)))[1];
    const slope = (moved(1e-3) - moved(-1e-3)) / 2e-3;
    assert.ok(Math.abs(heat[k] - value * slope) < 2e-3, `${k}: ${heat[k]} ${value * slope}`);
  });
});

test("statistics anew are those of the images", () => {
  const images = [1, 2, 3].map((seed) => dice(36, seed).map(Math.abs));
  const steps = vgg.measured(net(11), [[0, 2], [1]], images);
  let step = steps.next();
  while (!step.done) step = steps.next();
  const [first, second] = step.value;
  assert.equal(first.mean.length, 2);
  assert.equal(second.variance.length, 1);
  assert.ok(first.variance.every((v) => v > 0));
});

test("a head twice as far away is no head that is there", () => {
  const pairs = 1 + 3 + 3;
  const logits = Buffer.from(Int16Array.from({ length: pairs * 2 }, (_, k) => 100 * k).buffer).toString("base64");
  const data = { most: 2, classes: ["a", "b"], blocks: 1, heads: 3, logits };
  const of = (gone) => heads.compute(data, { image: 0, gone }).logits[0] / 2;
  assert.deepEqual([[], [0], [1], [2], [0, 1], [2, 0], [1, 2]].map(of), [0, 1, 2, 3, 4, 5, 6]);
  assert.throws(() => of([0, 1, 2]), /at most 2 heads/);
});
