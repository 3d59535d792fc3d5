/** The encoding's own part of the decoder's graph, run beside it: what attention sees of positions, by distance. */

import { biasRows, layersLabel, rotationProducts, similarities } from "./curves.js";
import { ERRORS_ONLY } from "./model.js";

const MOST_TOKENS = 384;

export class Encoding {
  /**
   * @param {any} ort the module of onnxruntime-web
   * @param {any} picture what the site's record says of the graph
   * @param {number[][]} caches heads and channels of each layer
   */
  constructor(ort, picture, caches) {
    this.ort = ort;
    this.picture = picture;
    this.caches = caches;
  }

  /** @param {Uint8Array} graph */
  async open(graph) {
    const options = { executionProviders: ["wasm"], logSeverityLevel: ERRORS_ONLY };
    this.session = await this.ort.InferenceSession.create(graph, options);
  }

  /**
   * @param {number} position of the current token
   * @returns {Promise<{distances: number[], groups: {label: string, lines: import("./curves.js").Line[]}[]}>}
   */
  async at(position) {
    const positions = this.positions(position);
    const outputs = await this.session.run(this.feeds(positions, position));
    const data = (name) => Float32Array.from(outputs[name].data);
    const distances = positions.map((p) => position - p).reverse();
    const { kind, curves } = this.picture;
    const groups = curves.map((curve) => {
      const label = curve.layers.length ? layersLabel(curve.layers) : "";
      if (kind === "bias") {
        const rows = biasRows(data(curve.value), outputs[curve.value].dims);
        return { label, lines: rows.map((row, h) => ({ label: `head ${h}`, values: sampled(row, positions) })) };
      }
      const values =
        kind === "rotation"
          ? rotationProducts(curve.query.map(data), curve.key.map(data), positions.length, curve.head_size)
          : similarities(data(curve.value), positions.length);
      return { label, lines: [{ label, values: values.reverse() }] };
    });
    return { distances, groups };
  }

  /** Positions to look at, ascending, the current one last; every one where the graph counts them itself. */
  positions(position) {
    const all = Array.from({ length: position + 1 }, (_, i) => i);
    const counted = this.picture.kind !== "bias" && !this.picture.inputs.includes("position_ids");
    if (counted || all.length <= MOST_TOKENS) return all;
    const step = position / (MOST_TOKENS - 1);
    return Array.from({ length: MOST_TOKENS }, (_, i) => Math.round(i * step));
  }

  /** A decode step for a bias; for the others a run of all positions at once. */
  feeds(positions, position) {
    const asked = this.picture.kind === "bias" ? [position] : positions;
    const sizes = { tokens: asked.length, past: position + 1 - asked.length, total: position + 1 };
    const int64 = (values) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const feeds = {};
    for (const name of this.picture.inputs) {
      if (name === "position_ids") feeds[name] = int64(asked);
      else if (name === "attention_mask") feeds[name] = int64(new Array(sizes.total).fill(1));
      else if (name === "input_ids") feeds[name] = int64(new Array(sizes.tokens).fill(0));
      else {
        const [heads, size] = this.caches[Number(name.split(".")[1])];
        const zeros = new Float32Array(heads * sizes.past * size);
        feeds[name] = new this.ort.Tensor("float32", zeros, [1, heads, sizes.past, size]);
      }
    }
    return feeds;
  }
}

/** A row of every key at some positions, by distance. */
function sampled(row, positions) {
  return Float32Array.from(positions, (p) => row[p]).reverse();
}
