/** What the page says of an encoding. */

const MEANING = {
  rotation: "Dot product of a query and a key with equal channels, turned to their positions",
  bias: "Term that is added to the scores of attention, one line for each head",
  embedding: "Likeness (cosine) of the current position's vector to those of earlier positions",
};

/**
 * @param {{kind: string, reason?: string, curves?: any[]}} picture of the site's record
 * @param {{position: number}|null} seen what was drawn last
 * @returns {string}
 */
export function captionOf(picture, seen) {
  if (picture.kind === "none") {
    const mask = "Order is known from the causal mask alone: with equal scores each of n tokens seen gets 1/n";
    return `No positional encoding: scores do not depend on the distance. ${mask}.`;
  }
  if (picture.kind === "unknown") return `No picture: ${picture.reason}.`;
  const where = seen ? `, seen from position ${seen.position}` : "";
  return `${MEANING[picture.kind]}${where}. Computed by the model's own graph.`;
}

/**
 * `theta 10,000 · interleaved no`.
 *
 * @param {Object<string, any>} parameters
 * @returns {string}
 */
export function parametersOf(parameters) {
  return Object.entries(parameters)
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${shown(value)}`)
    .join(" · ");
}

function shown(value) {
  if (value === null) return "none";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return value.toLocaleString("en", { maximumSignificantDigits: 6 });
  if (Array.isArray(value)) return value.length > 4 ? `${value.length} numbers` : value.map(shown).join(" ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
