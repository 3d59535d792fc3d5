/**
 * A decoder in onnxruntime-web: tokens in, the last token's logits out, keys and values kept between runs.
 *
 * The graph contract is that of pe-onnx: `past_key_values.{i}.key` in, `present.{i}.key` out, one token longer for
 * each token run. On WASM they are handed over as they are; on WebGPU they never leave the GPU.
 */

/** @typedef {{file: string, target: string, logits: string, vocab_size: number, caches: number[][],
 *   cache_dtype: string, path_dependent: boolean, inputs: string[]}} Decoder */

const CHUNK_TOKENS = 128;
export const ERRORS_ONLY = 3;
const ARRAYS = { float32: Float32Array, float16: globalThis.Float16Array ?? Uint16Array, int8: Int8Array };

export class Model {
  /**
   * @param {any} ort the module of onnxruntime-web
   * @param {Decoder} decoder what the site's record says of it
   * @param {"wasm"|"webgpu"} backend
   */
  constructor(ort, decoder, backend) {
    this.ort = ort;
    this.decoder = decoder;
    this.backend = backend;
    this.names = decoder.caches.flatMap((_, i) => [`${i}.key`, `${i}.value`]);
  }

  /**
   * @param {Uint8Array} graph the ONNX file
   * @param {{path: string, data: Uint8Array}[]} externalData its weights
   */
  async open(graph, externalData) {
    const location = Object.fromEntries(this.names.map((name) => [`present.${name}`, "gpu-buffer"]));
    this.session = await this.ort.InferenceSession.create(graph, {
      executionProviders: [this.backend],
      externalData,
      logSeverityLevel: ERRORS_ONLY,
      ...(this.backend === "webgpu" ? { preferredOutputLocation: { ...location, logits: "cpu" } } : {}),
    });
    this.reset();
  }

  /** Forget all tokens. */
  reset() {
    for (const tensor of this.cache ?? []) tensor.dispose();
    const { caches, cache_dtype } = this.decoder;
    this.cache = caches.flatMap(([heads, size]) =>
      [0, 1].map(() => new this.ort.Tensor(cache_dtype, new ARRAYS[cache_dtype](0), [1, heads, 0, size])),
    );
    this.length = 0;
  }

  /**
   * Run a prompt, in pieces where the encoding allows it.
   *
   * @param {number[]} ids
   * @param {(done: number) => Promise<boolean>} between called after each piece; false ends it early
   * @returns {Promise<Float32Array|null>} logits of the last token; null where it was ended
   */
  async prefill(ids, between) {
    const size = this.decoder.path_dependent ? ids.length : CHUNK_TOKENS;
    let logits = null;
    for (let at = 0; at < ids.length; at += size) {
      logits = await this.run(ids.slice(at, at + size));
      if (!(await between(Math.min(at + size, ids.length)))) return null;
    }
    return logits;
  }

  /**
   * Run some tokens behind those that are cached.
   *
   * @param {number[]} ids
   * @returns {Promise<Float32Array>} logits `[V]` of the last
   */
  async run(ids) {
    const past = this.length;
    const total = past + ids.length;
    const int64 = (values, dims) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
    const feeds = {
      input_ids: int64(ids, [1, ids.length]),
      attention_mask: int64(new Array(total).fill(1), [1, total]),
      position_ids: int64(ids.map((_, i) => past + i), [1, ids.length]),
    };
    this.names.forEach((name, i) => (feeds[`past_key_values.${name}`] = this.cache[i]));
    const outputs = await this.session.run(feeds);
    const old = this.cache;
    this.cache = this.names.map((name) => outputs[`present.${name}`]);
    for (const tensor of old) tensor.dispose();
    this.length = total;
    const { data } = outputs.logits;
    return data.subarray(data.length - this.decoder.vocab_size);
  }

  /** Give the session's memory back. */
  async close() {
    this.reset();
    await this.session?.release();
  }
}

/** Of onnxruntime-web: the module for a backend, and the build of WebAssembly it is for. */
const BUILDS = {
  wasm: ["ort.wasm.min.mjs", "ort-wasm-simd-threaded"],
  webgpu: ["ort.min.mjs", "ort-wasm-simd-threaded.jsep"],
};
const MOST_THREADS = 8;

/**
 * onnxruntime-web for a backend. Threads need a page that is isolated from other origins, by headers of its server.
 *
 * @param {"wasm"|"webgpu"} backend
 * @returns {Promise<any>}
 */
export async function loadRuntime(backend) {
  const folder = new URL("vendor/onnxruntime-web/", import.meta.url);
  const [module, build] = BUILDS[backend];
  const ort = await import(new URL(module, folder).href);
  const [mjs, wasm] = ["mjs", "wasm"].map((kind) => new URL(`${build}.${kind}`, folder).href);
  ort.env.wasm.wasmPaths = { mjs, wasm };
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  return ort;
}
