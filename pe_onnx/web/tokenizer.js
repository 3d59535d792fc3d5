/**
 * Text to token ids and back, for each kind of tokenizer that a bundle has. Special tokens are left out of a text.
 *
 * @typedef {{kind: string|null, eos: number[], silent: number[], unfinished: number[], chat_template: string|null,
 *   special_tokens: Object<string, string>, samples: {text: string, ids: number[], decoded: string}[]}} Entry
 */

/** Ids 0 to 255 are the bytes of UTF-8; ids above have no text. */
class BytesTokenizer {
  encode(text) {
    return Array.from(new TextEncoder().encode(text));
  }

  decode(ids) {
    const bytes = Uint8Array.from(ids.filter((id) => id < 256));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
  }
}

/** A plain vocabulary: at each character the longest token that matches. */
class VocabTokenizer {
  constructor(vocab, silent) {
    this.vocab = new Map(Object.entries(vocab));
    this.tokens = new Map(Array.from(this.vocab, ([token, id]) => [id, token]));
    this.longest = Math.max(...Array.from(this.vocab.keys(), (token) => Array.from(token).length));
    this.silent = silent;
  }

  encode(text) {
    const characters = Array.from(text);
    const ids = [];
    for (let start = 0; start < characters.length; ) {
      let end = Math.min(start + this.longest, characters.length);
      while (end > start && !this.vocab.has(characters.slice(start, end).join(""))) end--;
      const token = end > start ? characters.slice(start, end).join("") : "<unk>";
      if (!this.vocab.has(token)) throw new Error(`no token for “${characters[start]}” at character ${start}`);
      ids.push(this.vocab.get(token));
      start = Math.max(end, start + 1);
    }
    return ids;
  }

  decode(ids) {
    return ids.map((id) => (this.silent.has(id) ? "" : (this.tokens.get(id) ?? ""))).join("");
  }
}

/** The file of the tokenizers library, read by its JavaScript twin. */
class JsonTokenizer {
  constructor(twin) {
    this.twin = twin;
  }

  encode(text, special) {
    return Array.from(this.twin.encode(text, { add_special_tokens: special }).ids);
  }

  decode(ids) {
    if (!ids.length) return "";
    return this.twin.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}

/** Stands for the tokenizer of a bundle that has none: the text is the ids themselves, as in 1,2,3. */
class IdsTokenizer {
  encode(text) {
    const ids = text.split(",").map((part) => (/^\s*\d+\s*$/.test(part) ? Number(part) : NaN));
    if (ids.some(Number.isNaN)) throw new Error("this model has no tokenizer: give token ids, as in 1,2,3");
    return ids;
  }

  decode(ids) {
    return ids.map((id) => `${id},`).join("");
  }
}

export class Tokenizer {
  /**
   * @param {Entry} entry what the site's record says of it
   * @param {any} inner one of the kinds above
   * @param {any} [jinja] the module of the template engine, where there is a chat template
   */
  constructor(entry, inner, jinja) {
    this.entry = entry;
    this.inner = inner;
    this.jinja = jinja;
    this.silent = new Set(entry.silent ?? []);
    this.unfinished = new Set(entry.unfinished ?? []);
  }

  /**
   * @param {string} text
   * @param {boolean} [special] whether to put the tokenizer's own special tokens around it
   * @returns {number[]}
   */
  encode(text, special = true) {
    if (!text.isWellFormed()) throw new Error("the prompt is not valid Unicode");
    return this.inner.encode(text, special);
  }

  /** @param {number[]} ids */
  decode(ids) {
    return this.inner.decode(ids);
  }

  /** Whether an id has no text. @param {number} id */
  isSilent(id) {
    return this.silent.has(id);
  }

  /** Whether a later id may change the text of a sequence that ends in this one. @param {number} id */
  isUnfinished(id) {
    return this.unfinished.has(id);
  }

  /**
   * @param {string} prompt
   * @returns {string} a conversation of this one message, up to the header of the answer
   */
  chat(prompt) {
    const template = new this.jinja.Template(this.entry.chat_template);
    return template.render({
      messages: [{ role: "user", content: prompt }],
      add_generation_prompt: true,
      tools: null,
      documents: null,
      ...this.entry.special_tokens,
    });
  }

  /** Throws where a text is not encoded or decoded as it was when the site was made. */
  prove() {
    for (const { text, ids, decoded } of this.entry.samples ?? []) {
      const mine = this.encode(text);
      if (mine.join() !== ids.join() || this.decode(ids) !== decoded) {
        throw new Error(`this tokenizer.json is not read exactly in the browser (it fails on ${JSON.stringify(text)})`);
      }
    }
  }
}

/**
 * @param {Entry} entry
 * @param {(name: string) => Promise<any>} readJson a file of the bundle
 * @param {(name: string) => Promise<any>} readModule `tokenizers` or `jinja`
 * @returns {Promise<Tokenizer>} proven on the record's samples
 */
export async function loadTokenizer(entry, readJson, readModule) {
  const jinja = entry.chat_template ? await readModule("jinja") : undefined;
  const kinds = {
    bytes: () => new BytesTokenizer(),
    vocab: async () => new VocabTokenizer(await readJson("vocab.json"), new Set(entry.silent)),
    "tokenizer.json": async () => {
      const { Tokenizer: Twin } = await readModule("tokenizers");
      const config = entry.has_config ? await readJson("tokenizer_config.json") : {};
      return new JsonTokenizer(new Twin(await readJson("tokenizer.json"), config));
    },
    null: () => new IdsTokenizer(),
  };
  const tokenizer = new Tokenizer(entry, await kinds[entry.kind](), jinja);
  tokenizer.prove();
  return tokenizer;
}
