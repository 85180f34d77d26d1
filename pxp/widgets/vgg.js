/**
 * A VGG in plain JavaScript: forward, LRP-ε and z⁺ backward, filters really skipped, BatchNorm measured anew.
 *
 * Everything follows pxp: a pruned filter gives 0 behind its BatchNorm; relevance is x ⊙ g, so what flows back is g;
 * rules see each BatchNorm folded into its convolution. Planes carry a border of one zero, so that a convolution is one
 * flat loop: position k of the output reads k, k + 1, k + 2 of three rows.
 */

const STABLE = 1e-6; // pxp's stabiliser
const NORM = 1e-5; // BatchNorm's

/** Numbers of 16 bits (base64, little-endian) as floats. */
export function halves(text) {
  const bytes = unpacked(text);
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => half(view.getUint16(2 * i, true)));
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Bytes of base64. */
export function unpacked(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/**
 * Weights by layer. `convolutions` are { inputs, outputs, pool }, `linear` are [outputs, inputs]; `numbers` holds, in
 * order, each convolution's weight and bias with its BatchNorm's weight, bias, mean and variance, then the linear ones.
 */
export function network({ convolutions, linear }, numbers) {
  let at = 0;
  const take = (size) => numbers.subarray(at, (at += size));
  return {
    convolutions: convolutions.map(({ inputs, outputs, pool }) => ({
      inputs,
      outputs,
      pool,
      weight: take(9 * inputs * outputs),
      bias: take(outputs),
      norm: { weight: take(outputs), bias: take(outputs), mean: take(outputs), variance: take(outputs) },
    })),
    linear: linear.map(([outputs, inputs]) => ({ outputs, inputs, weight: take(outputs * inputs), bias: take(outputs) })),
  };
}

/**
 * The pruned network, physically smaller: `kept` lists the kept filters of each layer, `norms` (optional) other means
 * and variances. A linear layer keeps its outputs; the first reads only the channels that are left.
 */
export function pruned(net, kept, norms) {
  let before = [0];
  const convolutions = net.convolutions.map((layer, index) => {
    const rows = kept[index];
    const { mean, variance } = norms?.[index] ?? { mean: rows.map((j) => layer.norm.mean[j]), variance: rows.map((j) => layer.norm.variance[j]) };
    const columns = before;
    const [weight, bias] = [new Float32Array(9 * rows.length * columns.length), new Float32Array(rows.length)];
    rows.forEach((j, row) => {
      const scale = layer.norm.weight[j] / Math.sqrt(variance[row] + NORM);
      bias[row] = (layer.bias[j] - mean[row]) * scale + layer.norm.bias[j];
      columns.forEach((i, column) => {
        for (let tap = 0; tap < 9; tap += 1) {
          weight[9 * (row * columns.length + column) + tap] = scale * layer.weight[9 * (j * layer.inputs + i) + tap];
        }
      });
    });
    before = rows;
    return { inputs: columns.length, outputs: rows.length, pool: layer.pool, weight, bias };
  });
  const linear = net.linear.map((layer, index) => {
    if (index > 0) return layer;
    const weight = new Float32Array(layer.outputs * before.length);
    for (let j = 0; j < layer.outputs; j += 1) before.forEach((i, column) => (weight[j * before.length + column] = layer.weight[j * layer.inputs + i]));
    return { outputs: layer.outputs, inputs: before.length, weight, bias: layer.bias };
  });
  return { convolutions, linear };
}

/** Padded planes of one size. */
function planes(number, side) {
  return { number, side, values: new Float32Array(number * (side + 2) ** 2) };
}

/** An image of side² values as a padded plane. */
function padded(image) {
  const side = Math.round(Math.sqrt(image.length));
  const found = planes(1, side);
  for (let y = 0; y < side; y += 1) found.values.set(image.subarray(y * side, (y + 1) * side), (y + 1) * (side + 2) + 1);
  return found;
}

/**
 * A convolution of 3 × 3 with a border of zeros: `weight` (outputs, inputs, 9).
 *
 * Two outputs at a time, so that what is read serves twice; an odd last one is computed with itself.
 */
function convolve(x, weight, bias, outputs) {
  const { number, side, values } = x;
  const wide = side + 2;
  const plane = wide * wide;
  const found = planes(outputs, side);
  const last = side * wide - 2; // two positions of each row lie outside; they are computed and not used
  const [one, two] = [new Float32Array(side * wide), new Float32Array(side * wide)];
  for (let j = 0; j < outputs; j += 2) {
    const other = Math.min(j + 1, outputs - 1);
    one.fill(bias ? bias[j] : 0);
    two.fill(bias ? bias[other] : 0);
    for (let i = 0; i < number; i += 1) {
      taps(values, i * plane, wide, last, weight, 9 * (j * number + i), 9 * (other * number + i), one, two);
    }
    for (let y = 0; y < side; y += 1) {
      const to = (y + 1) * wide + 1;
      for (let k = 0; k < side; k += 1) {
        found.values[j * plane + to + k] = one[y * wide + k];
        found.values[other * plane + to + k] = two[y * wide + k];
      }
    }
  }
  return found;
}

/** Adds nine weighted shifts of one plane to two outputs. */
function taps(values, start, wide, last, weight, p, q, one, two) {
  const [a0, a1, a2, a3, a4] = [weight[p], weight[p + 1], weight[p + 2], weight[p + 3], weight[p + 4]];
  const [a5, a6, a7, a8] = [weight[p + 5], weight[p + 6], weight[p + 7], weight[p + 8]];
  const [b0, b1, b2, b3, b4] = [weight[q], weight[q + 1], weight[q + 2], weight[q + 3], weight[q + 4]];
  const [b5, b6, b7, b8] = [weight[q + 5], weight[q + 6], weight[q + 7], weight[q + 8]];
  let [u, v, w] = [start, start + wide, start + 2 * wide];
  let [x0, x1, y0, y1, z0, z1] = [values[u], values[u + 1], values[v], values[v + 1], values[w], values[w + 1]];
  for (let k = 0; k < last; k += 1, u += 1, v += 1, w += 1) {
    const x2 = values[u + 2]; const y2 = values[v + 2]; const z2 = values[w + 2];
    one[k] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * y0 + a4 * y1 + a5 * y2 + a6 * z0 + a7 * z1 + a8 * z2;
    two[k] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * y0 + b4 * y1 + b5 * y2 + b6 * z0 + b7 * z1 + b8 * z2;
    x0 = x1;
    x1 = x2;
    y0 = y1;
    y1 = y2;
    z0 = z1;
    z1 = z2;
  }
}

/** The weight with which a convolution goes backwards: inputs and outputs exchanged, kernels turned. */
function turned(weight, outputs, inputs) {
  const found = new Float32Array(weight.length);
  for (let j = 0; j < outputs; j += 1) {
    for (let i = 0; i < inputs; i += 1) {
      for (let tap = 0; tap < 9; tap += 1) found[9 * (i * outputs + j) + tap] = weight[9 * (j * inputs + i) + 8 - tap];
    }
  }
  return found;
}

const positive = (values) => values.map((x) => Math.max(x, 0));

/** Maximum of each 2 × 2; `from` remembers where it stood. */
function pool(x) {
  const side = Math.floor(x.side / 2);
  const found = planes(x.number, side);
  const from = new Int32Array(found.values.length);
  const wide = x.side + 2;
  for (let c = 0; c < x.number; c += 1) {
    for (let y = 0; y < side; y += 1) {
      for (let z = 0; z < side; z += 1) {
        const corner = c * wide * wide + (2 * y + 1) * wide + 2 * z + 1;
        let best = corner;
        for (const other of [corner + 1, corner + wide, corner + wide + 1]) if (x.values[other] > x.values[best]) best = other;
        const to = c * (side + 2) ** 2 + (y + 1) * (side + 2) + z + 1;
        found.values[to] = x.values[best];
        from[to] = best;
      }
    }
  }
  return { found, from };
}

function rectified(x) {
  return { ...x, values: positive(x.values) };
}

/** Mean of each plane. */
function means({ number, side, values }) {
  const plane = (side + 2) ** 2;
  return Float32Array.from({ length: number }, (_, c) => {
    let sum = 0;
    for (let k = c * plane; k < (c + 1) * plane; k += 1) sum += values[k];
    return sum / side ** 2;
  });
}

function multiplied({ weight, bias, outputs, inputs }, x) {
  const found = new Float32Array(outputs);
  for (let j = 0; j < outputs; j += 1) {
    let sum = bias[j];
    for (let i = 0; i < inputs; i += 1) sum += weight[j * inputs + i] * x[i];
    found[j] = sum;
  }
  return found;
}

/** Logits of one image (side² values), and with `tape` what the way back needs. */
export function forward(net, image, tape) {
  let x = padded(image);
  for (const layer of net.convolutions) {
    const z = convolve(x, layer.weight, layer.bias, layer.outputs);
    const h = rectified(z);
    const pooled = layer.pool ? pool(h) : null;
    tape?.push({ layer, x, z, from: pooled?.from });
    x = pooled ? pooled.found : h;
  }
  let a = means(x);
  tape?.push({ averaged: x });
  net.linear.forEach((layer, index) => {
    const z = multiplied(layer, a);
    tape?.push({ layer, x: a, z });
    a = index < net.linear.length - 1 ? positive(z) : z;
  });
  return a;
}

/** What flows from a layer's output into its rule: g · z / denominator, nothing where the unit is silent. */
function shares(flow, z, below, silent) {
  return flow.map((g, k) => (silent && z[k] <= 0 ? 0 : (g * z[k]) / (below[k] + (below[k] < 0 ? -STABLE : STABLE))));
}

/** Relevance of an image's pixels for one class, by the rule "epsilon" or "zplus" in every layer. */
export function heatmap(net, image, target, rule) {
  const tape = [];
  const logits = forward(net, image, tape);
  const part = rule === "zplus" ? positive : (x) => x;
  let flow = logits.map((_, j) => (j === target ? 1 : 0));
  for (let index = net.linear.length - 1; index >= 0; index -= 1) {
    const { layer, x, z } = tape.pop();
    const weight = part(layer.weight);
    const below = rule === "zplus" ? multiplied({ ...layer, weight, bias: positive(layer.bias) }, x) : z;
    const s = shares(flow, z, below, index < net.linear.length - 1);
    flow = x.map((_, i) => {
      let sum = 0;
      for (let j = 0; j < layer.outputs; j += 1) sum += weight[j * layer.inputs + i] * s[j];
      return sum;
    });
  }
  const { averaged } = tape.pop();
  let back = planes(averaged.number, averaged.side);
  const plane = (averaged.side + 2) ** 2;
  back.values.forEach((_, k) => (back.values[k] = flow[Math.floor(k / plane)] / averaged.side ** 2));
  while (tape.length) {
    const { layer, x, z, from } = tape.pop();
    let g = back.values;
    if (from) {
      g = new Float32Array(z.values.length);
      from.forEach((to, k) => to && (g[to] += back.values[k]));
    }
    const weight = part(layer.weight);
    const below = rule === "zplus" ? convolve(x, weight, positive(layer.bias), layer.outputs).values : z.values;
    const s = { ...z, values: shares(g, z.values, below, true) };
    back = convolve(s, turned(weight, layer.outputs, layer.inputs), null, layer.inputs);
  }
  const side = back.side;
  const found = new Float32Array(side * side);
  for (let y = 0; y < side; y += 1) {
    for (let z = 0; z < side; z += 1) found[y * side + z] = image[y * side + z] * back.values[(y + 1) * (side + 2) + z + 1];
  }
  return found;
}

/**
 * Means and variances of every BatchNorm anew, on what the pruned network gives for some images: each layer is
 * normalised with its own before the next one is measured, as pxp.repair(…, "statistics") does. A generator: it yields
 * after each layer and returns the norms for `pruned`.
 */
export function* measured(net, kept, images) {
  let xs = images.map(padded);
  let before = [0];
  const norms = [];
  for (const [index, layer] of net.convolutions.entries()) {
    const rows = kept[index];
    const weight = new Float32Array(9 * rows.length * before.length);
    rows.forEach((j, row) =>
      before.forEach((i, column) =>
        weight.set(layer.weight.subarray(9 * (j * layer.inputs + i), 9 * (j * layer.inputs + i) + 9), 9 * (row * before.length + column)),
      ),
    );
    const bias = rows.map((j) => layer.bias[j]);
    const zs = [];
    for (const x of xs) {
      zs.push(convolve(x, weight, bias, rows.length));
      if (zs.length % 10 === 0) yield index;
    }
    const { mean, biased, unbiased } = moments(zs, rows.length);
    norms.push({ mean, variance: unbiased });
    xs = zs.map((z) => {
      const scale = rows.map((j, row) => layer.norm.weight[j] / Math.sqrt(biased[row] + NORM));
      const shift = rows.map((j, row) => layer.norm.bias[j] - mean[row] * scale[row]);
      const h = inside(z, (value, row) => Math.max(value * scale[row] + shift[row], 0));
      return layer.pool ? pool(h).found : h;
    });
    before = rows;
    yield index;
  }
  return norms;
}

/** Another value for each one that is not border. */
function inside(x, change) {
  const found = planes(x.number, x.side);
  const wide = x.side + 2;
  for (let c = 0; c < x.number; c += 1) {
    for (let y = 1; y <= x.side; y += 1) {
      const row = c * wide * wide + y * wide;
      for (let k = row + 1; k <= row + x.side; k += 1) found.values[k] = change(x.values[k], c);
    }
  }
  return found;
}

function moments(zs, number) {
  const [mean, biased, unbiased] = [0, 0, 0].map(() => new Float64Array(number));
  if (!number) return { mean, biased, unbiased };
  const { side } = zs[0];
  const [plane, count] = [(side + 2) ** 2, zs.length * side ** 2];
  const each = (use) => {
    for (const { values } of zs) {
      for (let c = 0; c < number; c += 1) {
        for (let y = 1; y <= side; y += 1) {
          const row = c * plane + y * (side + 2);
          for (let k = row + 1; k <= row + side; k += 1) use(values[k], c);
        }
      }
    }
  };
  each((value, c) => (mean[c] += value / count));
  each((value, c) => (biased[c] += (value - mean[c]) ** 2 / count));
  unbiased.forEach((_, c) => (unbiased[c] = (biased[c] * count) / (count - 1)));
  return { mean, biased, unbiased };
}
