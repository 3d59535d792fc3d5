/**
 * What an encoding does, by distance, from the values that its part of the graph computes.
 *
 * @typedef {{label: string, values: Float32Array}} Line by distance: values[d] is d tokens before the current one
 */

/**
 * Of a rotation: the dot product of a query and a key with equal channels, as a share of what it is without rotation.
 * Queries and keys are turned by the angles of their positions, so each pair of channels gives the cosine of the
 * angle between them; channels that are not turned give 1.
 *
 * @param {Float32Array[]} query cosines and sines `[T, W]` that turn queries, the current token last
 * @param {Float32Array[]} key the same for keys
 * @param {number} tokens T
 * @param {number} headSize channels of a head
 * @returns {Float32Array} by index of the key's token, first to last
 */
export function rotationProducts(query, key, tokens, headSize) {
  const width = query[0].length / tokens;
  const turned = Math.min(1, (isTwice(query[1].subarray((tokens - 1) * width)) ? width : 2 * width) / headSize);
  const at = (tokens - 1) * width;
  return Float32Array.from({ length: tokens }, (_, j) => {
    let sum = 0;
    for (let i = 0; i < width; i++) {
      sum += query[0][at + i] * key[0][j * width + i] + query[1][at + i] * key[1][j * width + i];
    }
    return (turned * sum) / width + 1 - turned;
  });
}

/** Whether a table holds each angle twice, for both channels of a pair, side by side or half by half. */
function isTwice(row) {
  const half = row.length / 2;
  const equal = (a, b) => Array.from({ length: half }).every((_, i) => row[a(i)] === row[b(i)]);
  if (row.length < 4 || row.length % 2) return false;
  const halves = equal((i) => i, (i) => i + half);
  return halves || equal((i) => 2 * i, (i) => 2 * i + 1);
}

/**
 * Of vectors that are added to the tokens': the cosine of the angle between the current position's and the others.
 *
 * @param {Float32Array} vectors `[T, C]`, the current position last
 * @param {number} tokens T
 * @returns {Float32Array} by index, first to last
 */
export function similarities(vectors, tokens) {
  const width = vectors.length / tokens;
  const row = (j) => vectors.subarray(j * width, (j + 1) * width);
  const product = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  const last = row(tokens - 1);
  return Float32Array.from({ length: tokens }, (_, j) => {
    return product(row(j), last) / Math.sqrt(product(row(j), row(j)) * product(last, last));
  });
}

/**
 * Of a bias: the last query's row of each head.
 *
 * @param {Float32Array} bias `[1, H, T, S]`
 * @param {number[]} dims
 * @returns {Float32Array[]} of each head, by index of the key, first to last
 */
export function biasRows(bias, dims) {
  const [, heads, tokens, keys] = dims;
  return Array.from({ length: heads }, (_, h) => {
    const at = (h * tokens + tokens - 1) * keys;
    return bias.slice(at, at + keys);
  });
}

/**
 * `layers 0 to 3, 5` of a list of layers.
 *
 * @param {number[]} layers ascending
 * @returns {string}
 */
export function layersLabel(layers) {
  const runs = [];
  for (const layer of layers) {
    const run = runs[runs.length - 1];
    if (run && run[1] === layer - 1) run[1] = layer;
    else runs.push([layer, layer]);
  }
  const parts = runs.map(([a, b]) => (a === b ? `${a}` : b === a + 1 ? `${a}, ${b}` : `${a} to ${b}`));
  return `layer${layers.length > 1 ? "s" : ""} ${parts.join(", ")}`;
}
