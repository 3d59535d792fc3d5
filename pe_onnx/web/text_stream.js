/** Text of token ids that arrive one by one: nothing that a later token can change. */

const REPLACEMENT = "\ufffd";
const MOST_HELD_TOKENS = 16;

/**
 * Joined, the pieces are the whole decoding of the ids. A window is decoded: the tokens of the last piece, whose text
 * is out, and those held back because their bytes are not a whole character yet.
 */
export class TextStream {
  /**
   * @param {import("./tokenizer.js").Tokenizer} tokenizer
   * @param {number[]} prompt the ids before the first one pushed
   */
  constructor(tokenizer, prompt) {
    this.tokenizer = tokenizer;
    this.window = prompt.slice(-MOST_HELD_TOKENS).filter((id) => !tokenizer.isSilent(id));
    this.read = this.window.length;
  }

  /**
   * @param {number} id the next token
   * @returns {string} the text that is certain by now
   */
  push(id) {
    if (this.tokenizer.isSilent(id)) return "";
    this.window.push(id);
    const text = this.tokenizer.decode(this.window);
    let end = this.window.length;
    if (text.endsWith(REPLACEMENT) || this.tokenizer.isUnfinished(id)) {
      if (end - this.read < MOST_HELD_TOKENS) return "";
      end = this.lastBorder(text);
    }
    return this.advance(end);
  }

  /** @returns {string} the text that was held back: no token follows */
  finish() {
    return this.advance(this.window.length);
  }

  /** The last token border with a whole character before it, else one that no character crosses. */
  lastBorder(text) {
    const { window, tokenizer } = this;
    const end = window.length;
    const decode = (from, to) => tokenizer.decode(window.slice(from, to));
    const between = (from, to, holds) => Array.from({ length: to - from }, (_, i) => from + i).filter(holds);
    const whole = between(end - 3, end + 1, (n) => !decode(0, n).endsWith(REPLACEMENT));
    const apart = between(end - 6, end - 2, (n) => decode(0, n) + decode(n, end) === text);
    return Math.max(...(whole.length ? whole : apart.length ? apart : [end]));
  }

  /** The text of the window's tokens from `read` to `end`; they become the context of the next. */
  advance(end) {
    const before = this.tokenizer.decode(this.window.slice(0, this.read));
    const after = this.tokenizer.decode(this.window.slice(0, end));
    const piece = after.startsWith(before)
      ? after.slice(before.length)
      : this.tokenizer.decode(this.window.slice(this.read, end));
    this.window = this.window.slice(this.read);
    this.read = end - this.read;
    return piece;
  }
}
