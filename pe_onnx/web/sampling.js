/** The next token from logits: the most likely, or drawn at a temperature from the most likely that make up top-p. */

export class Sampler {
  /** @param {{temperature: number, topP: number, seed: number}} options temperature 0 is greedy */
  constructor({ temperature, topP, seed }) {
    this.temperature = temperature;
    this.topP = topP;
    this.state = seed >>> 0;
  }

  /**
   * @param {Float32Array} logits of one token
   * @returns {number} an id; the lowest among equals where it is greedy
   */
  next(logits) {
    let best = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
    if (!Number.isFinite(logits[best])) throw new Error("the model overflowed: its largest logit is no finite number");
    return this.temperature === 0 ? best : this.draw(logits, logits[best]);
  }

  draw(logits, peak) {
    const weights = Float64Array.from(logits, (x) => Math.exp((x - peak) / this.temperature));
    const sum = weights.reduce((a, b) => a + b, 0);
    let kept = Array.from(weights.keys());
    if (this.topP < 1) {
      const floor = Math.min(((1 - this.topP) / weights.length) * sum, 1);
      kept = kept.filter((i) => weights[i] >= floor).sort((a, b) => weights[b] - weights[a] || b - a);
      let mass = 0;
      kept = kept.filter((i, rank) => {
        const before = mass;
        mass += weights[i];
        return rank === 0 || before < this.topP * sum;
      });
    }
    let point = this.random() * kept.reduce((a, i) => a + weights[i], 0);
    for (const i of kept) if ((point -= weights[i]) < 0) return i;
    return kept[kept.length - 1];
  }

  /** Uniform in [0, 1): mulberry32 (Tommy Ettinger, public domain). */
  random() {
    this.state = (this.state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(this.state ^ (this.state >>> 15), this.state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  }
}
