/** Lines by distance on a canvas, in the page's colours. */

const LEAST_DISTANCE = 32;
const MARGIN = { left: 46, right: 14, top: 12, bottom: 38 };
const LABEL_WIDTH = 46;
const MOST_LABELS = 8;
const LABEL_HEIGHT = 13;

/**
 * @param {HTMLCanvasElement} canvas
 * @param {number[]} distances ascending
 * @param {import("./curves.js").Line[]} lines
 */
export function drawChart(canvas, distances, lines) {
  const ratio = globalThis.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(name).trim();
  context.font = `12px ${style.fontFamily}`;

  const farthest = distances[distances.length - 1] ?? 0;
  const end = axisEnd(farthest);
  const [low, high] = bounds(lines);
  const labelled = lines.length > 1 && lines.length <= MOST_LABELS;
  const right = width - MARGIN.right - (labelled ? LABEL_WIDTH : 0);
  const x = (distance) => MARGIN.left + (distance / end) * (right - MARGIN.left);
  const y = (value) => height - MARGIN.bottom - ((value - low) / (high - low)) * (height - MARGIN.top - MARGIN.bottom);
  const stroke = (points, name, { thickness = 1, dash = [] } = {}) => {
    context.beginPath();
    points.forEach(([a, b], i) => (i ? context.lineTo(a, b) : context.moveTo(a, b)));
    context.strokeStyle = name.startsWith("--") ? colour(name) : name;
    context.lineWidth = thickness;
    context.setLineDash(dash);
    context.stroke();
  };
  const write = (text, a, b, align, baseline, fill = colour("--soft")) => {
    context.fillStyle = fill;
    context.textAlign = align;
    context.textBaseline = baseline;
    context.fillText(text, a, b);
  };

  for (const value of ticks(low, high)) {
    stroke([[MARGIN.left, y(value)], [right, y(value)]], "--line");
    write(shown(value), MARGIN.left - 8, y(value), "right", "middle");
  }
  stroke([[MARGIN.left, y(0)], [right, y(0)]], "--soft");
  for (const distance of [0, end / 4, end / 2, (3 * end) / 4, end]) {
    write(`${distance}`, x(distance), height - MARGIN.bottom + 6, "center", "top");
  }
  write("tokens before the current one", (MARGIN.left + right) / 2, height - 2, "center", "bottom");

  const labels = [];
  lines.forEach((line, i) => {
    const points = Array.from(line.values, (value, j) => [x(distances[j]), y(value)]);
    const own = lineColour(i, lines.length, colour("--accent"));
    stroke(points, own, { thickness: 1.75 });
    context.beginPath();
    context.arc(...points[0], 3, 0, 2 * Math.PI);
    context.fillStyle = own;
    context.fill();
    const [endX, endY] = points[points.length - 1];
    labels.push({ text: line.label, x: endX + 6, y: endY, own });
  });
  if (labelled) for (const { text, x, y, own } of apart(labels)) write(text, x, y, "left", "middle", own);
  if (farthest > 0) {
    stroke([[x(farthest), MARGIN.top], [x(farthest), y(low)]], "--accent", { dash: [4, 4] });
    const left = labelled || x(farthest) > width / 2;
    write("first token", x(farthest) + (left ? -5 : 5), MARGIN.top, left ? "right" : "left", "top");
  }
}

/** The axis grows in steps, so that it stands still between them. */
function axisEnd(farthest) {
  let end = LEAST_DISTANCE;
  while (end < farthest) end *= 2;
  return end;
}

/** Of all values and 0, with some room. */
function bounds(lines) {
  let low = 0;
  let high = 0;
  for (const { values } of lines) {
    for (const value of values) {
      if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
    }
  }
  const margin = (high - low) * 0.06 || 0.5;
  return [low - margin, high + margin];
}

/** Round numbers inside the bounds, about five. */
function ticks(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((size) => size >= rough);
  const first = Math.ceil(low / step);
  const count = Math.floor(high / step) - first + 1;
  return Array.from({ length: count }, (_, i) => (first + i) * step);
}

/** Labels from top to bottom, each low enough not to cover the one above. */
function apart(labels) {
  const sorted = labels.sort((a, b) => a.y - b.y);
  sorted.forEach((label, i) => {
    if (i) label.y = Math.max(label.y, sorted[i - 1].y + LABEL_HEIGHT);
  });
  return sorted;
}

function shown(value) {
  return Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
}

/** One line in the accent, several around the wheel. */
function lineColour(index, count, accent) {
  return count === 1 ? accent : `hsl(${(220 + (300 * index) / count) % 360} 62% 55%)`;
}
