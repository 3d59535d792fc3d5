/** Loads a model and runs it, away from the page, so that the page stays responsive and a stop is heard at once. */

import { Encoding } from "./encoding.js";
import { fetchBytes, fetchJson } from "./files.js";
import { Model, loadRuntime } from "./model.js";
import { Sampler } from "./sampling.js";
import { TextStream } from "./text_stream.js";
import { loadTokenizer } from "./tokenizer.js";

const PICTURE_EVERY_MS = 150;
const FIRST_POSITION = 63;

let site, model, tokenizer, encoding;
let stopped = false;

const actions = {
  load,
  run,
  stop() {
    stopped = true;
  },
};

onmessage = async ({ data }) => {
  try {
    await actions[data.action](data);
  } catch (error) {
    postMessage({ type: "error", during: data.action, message: readable(error) });
  }
};

async function load({ backend }) {
  const begin = performance.now();
  site = await fetchJson("site.json");
  const { decoder } = site;
  const files = [decoder.graph, ...(decoder.weights ? [decoder.weights] : [])];
  const total = files.reduce((sum, file) => sum + site.files[file], 0);
  let loaded = 0;
  const arrived = (bytes) => postMessage({ type: "progress", loaded: (loaded += bytes), total });
  const ort = await loadRuntime(backend);
  tokenizer = await loadTokenizer(
    site.tokenizer,
    (name) => fetchJson(`bundle/${name}`),
    (name) => import(`./vendor/${name}/${name}.mjs`),
  );
  encoding = await openEncoding(ort);
  await draw(Math.min(FIRST_POSITION, limit() - 1));
  const [graph, weights] = await Promise.all(files.map((file) => fetchBytes(file, site.files[file], arrived)));
  postMessage({ type: "opening" });
  model = new Model(ort, decoder, backend);
  await model.open(graph, weights ? [{ path: decoder.weights.split("/").pop(), data: weights }] : []);
  postMessage({ type: "ready", seconds: (performance.now() - begin) / 1000, threads: ort.env.wasm.numThreads });
}

async function openEncoding(ort) {
  const { picture } = site.encoding;
  if (!picture.curves) return null;
  const opened = new Encoding(ort, picture, site.decoder.caches);
  await opened.open(await fetchBytes("encoding.onnx", site.files["encoding.onnx"], () => {}));
  return opened;
}

async function draw(position) {
  const seen = encoding ? await encoding.at(position) : { distances: [], groups: [] };
  postMessage({ type: "picture", position, ...seen });
}

async function run({ prompt, chat, maxNewTokens, ...options }) {
  stopped = false;
  const ids = chat ? tokenizer.encode(tokenizer.chat(prompt), false) : tokenizer.encode(prompt);
  check(ids);
  const sampler = new Sampler(options);
  const text = new TextStream(tokenizer, ids);
  const ends = new Set(site.tokenizer.eos);
  const tokens = [];
  model.reset();
  const begin = performance.now();
  let logits = await model.prefill(ids, async (done) => {
    postMessage({ type: "prefill", done, ms: performance.now() - begin });
    return heard();
  });
  const decoding = performance.now();
  let drawn = 0;
  let reason = logits ? null : "stopped";
  while (!reason) {
    const id = sampler.next(logits);
    tokens.push(id);
    const ended = ends.has(id);
    postMessage({
      type: "token",
      piece: ended ? "" : text.push(id),
      new: tokens.length,
      used: ids.length + tokens.length,
      decodedMs: performance.now() - decoding,
    });
    if (performance.now() - drawn > PICTURE_EVERY_MS) {
      await draw(model.length - 1);
      drawn = performance.now();
    }
    if (ended) reason = "end of text";
    else if (tokens.length >= maxNewTokens) reason = "token limit";
    else if (model.length >= limit()) reason = "length limit";
    else if (!(await heard())) reason = "stopped";
    else logits = await model.run([id]);
  }
  await draw(Math.max(model.length - 1, 0));
  postMessage({ type: "done", reason, piece: text.finish(), tokens });
}

function check(ids) {
  const { vocab_size } = site.decoder;
  if (!ids.length) throw new Error("the prompt is empty: give at least one token");
  const strange = ids.find((id) => id >= vocab_size);
  if (strange !== undefined) throw new Error(`token id ${strange} is not in the vocabulary of ${vocab_size}`);
  if (ids.length > limit()) throw new Error(`the prompt has ${ids.length} tokens; the model takes ${limit()}`);
}

function limit() {
  return site.decoder.trained_length ?? site.decoder.max_length ?? Infinity;
}

/** Let messages in; false once a stop was among them. */
function heard() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve(!stopped);
    };
    port2.postMessage(null);
  });
}

/** One line; onnxruntime throws bare numbers where memory runs out. */
function readable(error) {
  if (typeof error === "number") return "onnxruntime-web ended: most likely the memory of WebAssembly ran out";
  return String(error?.message ?? error).trim().split("\n")[0];
}
