/** The page: what is typed and pressed goes to the worker, what comes back is shown. */

import { drawChart } from "./chart.js";
import { fetchJson } from "./files.js";
import { captionOf, parametersOf } from "./words.js";

const at = (id) => document.getElementById(id);
const form = at("form");
const state = { site: null, worker: null, ready: false, running: false, picture: null, waiting: null };

const handlers = {
  progress({ loaded, total }) {
    at("progress").value = loaded / total;
    at("status").textContent = `Loading ${megabytes(loaded)} of ${megabytes(total)}`;
  },
  opening() {
    at("progress").removeAttribute("value");
    at("status").textContent = "Preparing the model …";
  },
  ready({ seconds, threads }) {
    at("progress").hidden = true;
    const backend = form.elements.backend.value === "webgpu" ? "WebGPU" : "WASM";
    const threaded = backend === "WASM" ? `, ${threads} thread${threads > 1 ? "s" : ""}` : "";
    at("status").textContent = `Ready on ${backend}${threaded}, loaded in ${seconds.toFixed(1)} s`;
    state.ready = true;
    showButtons();
  },
  picture(picture) {
    state.picture = picture;
    showPicture();
  },
  prefill({ done, ms }) {
    at("prefill-rate").textContent = rate(done, ms);
    at("used").textContent = used(done);
  },
  token(token) {
    if (!state.waiting) requestAnimationFrame(showTokens);
    state.waiting = { ...token, piece: (state.waiting?.piece ?? "") + token.piece };
  },
  done({ reason, piece, tokens }) {
    showTokens();
    append(piece);
    at("reason").textContent = reason;
    at("answer").dataset.tokens = tokens.join();
    finish();
  },
  error({ during, message }) {
    at("error").textContent = message;
    at("error").hidden = false;
    if (during === "load") at("loading").hidden = true;
    finish();
  },
};

start();

async function start() {
  try {
    state.site = await fetchJson("site.json");
  } catch (error) {
    handlers.error({ during: "load", message: error.message });
    return;
  }
  const { title, decoder, encoding, tokenizer } = state.site;
  document.title = at("title").textContent = title;
  at("about").textContent = aboutOf(decoder);
  at("encoding-title").textContent = `Encoding: ${encoding.name}`;
  at("parameters").textContent = parametersOf(encoding.parameters);
  at("chat-switch").hidden = !tokenizer.chat_template;
  at("prompt").value = tokenizer.kind === null ? "1,2,3" : tokenizer.chat_template ? "Why is the sky blue?" : "Once upon a time";
  showPicture();
  await offerWebGpu(decoder.webgpu_refusal);
  load();
}

async function offerWebGpu(refusal) {
  const adapter = refusal ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  const radio = form.elements.backend[1];
  radio.disabled = !adapter;
  if (adapter) return;
  at("webgpu-note").textContent = `No WebGPU: ${refusal ?? "this browser has no adapter for it"}.`;
  at("webgpu-note").hidden = false;
}

/** A worker of its own for each backend: what the old one held is given back. */
function load() {
  state.worker?.terminate();
  Object.assign(state, { ready: false, running: false, waiting: null });
  at("error").hidden = true;
  at("loading").hidden = at("progress").hidden = false;
  at("progress").value = 0;
  showButtons();
  state.worker = new Worker("worker.js", { type: "module" });
  state.worker.onmessage = ({ data }) => handlers[data.type](data);
  state.worker.onerror = (event) => handlers.error({ during: "load", message: event.message || "worker.js failed" });
  state.worker.postMessage({ action: "load", backend: form.elements.backend.value });
}

function run(event) {
  event?.preventDefault();
  if (!state.ready || state.running || !form.reportValidity()) return;
  state.running = true;
  at("error").hidden = true;
  at("answer").textContent = "";
  delete at("answer").dataset.tokens;
  for (const id of ["prefill-rate", "decode-rate", "used", "reason"]) at(id).textContent = "–";
  showButtons();
  state.worker.postMessage({
    action: "run",
    prompt: at("prompt").value,
    chat: Boolean(state.site.tokenizer.chat_template) && at("chat").checked,
    maxNewTokens: at("max-new-tokens").valueAsNumber,
    temperature: at("temperature").valueAsNumber,
    topP: at("top-p").valueAsNumber,
    seed: at("seed").valueAsNumber,
  });
}

function finish() {
  state.running = false;
  showButtons();
}

/** What came since the last frame: a quick model makes more tokens than a screen shows. */
function showTokens() {
  if (!state.waiting) return;
  const { piece, new: count, used: total, decodedMs } = state.waiting;
  state.waiting = null;
  append(piece);
  at("decode-rate").textContent = rate(count - 1, decodedMs);
  at("used").textContent = used(total);
}

function append(piece) {
  const answer = at("answer");
  const following = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 40;
  if (piece) answer.append(piece);
  if (following) answer.scrollTop = answer.scrollHeight;
}

function showButtons() {
  at("run").disabled = !state.ready || state.running;
  at("stop").disabled = !state.running;
}

function showPicture() {
  const { picture } = state.site.encoding;
  const groups = state.picture?.groups ?? [];
  const select = at("group");
  if (select.options.length !== groups.length) {
    select.replaceChildren(...groups.map((group) => new Option(group.label)));
    at("group-label").hidden = groups.length < 2;
  }
  at("chart").hidden = !picture.curves;
  at("caption").textContent = captionOf(picture, state.picture);
  const group = groups[select.selectedIndex] ?? groups[0];
  if (group) drawChart(at("chart"), state.picture.distances, group.lines);
}

function aboutOf(decoder) {
  const parts = [decoder.precision, `target ${decoder.target}`, `${decoder.caches.length} layers`];
  if (decoder.max_length) parts.push(`at most ${decoder.max_length.toLocaleString("en")} tokens`);
  else if (decoder.trained_length) parts.push(`trained on ${decoder.trained_length.toLocaleString("en")} tokens`);
  return parts.join(" · ");
}

function used(count) {
  const { trained_length, max_length } = state.site.decoder;
  const limit = trained_length ?? max_length;
  return limit ? `${count.toLocaleString("en")} of ${limit.toLocaleString("en")}` : count.toLocaleString("en");
}

function rate(tokens, ms) {
  return tokens > 0 && ms > 0 ? `${((1000 * tokens) / ms).toFixed(1)} tokens/s` : "–";
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}

form.addEventListener("submit", run);
at("stop").addEventListener("click", () => state.worker.postMessage({ action: "stop" }));
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
});
for (const radio of form.elements.backend) radio.addEventListener("change", load);
at("temperature").addEventListener("input", (event) => form.classList.toggle("draws", event.target.valueAsNumber > 0));
at("group").addEventListener("change", showPicture);
new ResizeObserver(showPictureIfAny).observe(at("chart"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showPictureIfAny);

function showPictureIfAny() {
  if (state.picture) showPicture();
}
