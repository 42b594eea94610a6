// Schedule charts, drawing: the data of one chart laid out in rows and lanes, and put on a canvas.

const THIN = 0.26; // height of a communication lane over the compute lane's
const ALL_ROWS_PX = 620;
const ROW_PX = [11, 46]; // the least and the most of a row
const AXIS_PX = 26;

// A lane's spans with starts and ends in ticks, and the longest, for searching.
function decodeLane(lane, data) {
  if (lane.bins !== undefined) return { stream: lane.stream, bins: lane.bins };
  const number = lane.gap.length;
  const starts = new Float64Array(number), ends = new Float64Array(number);
  let at = 0, longest = 0;
  for (let i = 0; i < number; i++) {
    starts[i] = at + lane.gap[i];
    ends[i] = at = starts[i] + lane.length[i];
    longest = Math.max(longest, lane.length[i]);
  }
  return { stream: lane.stream, starts, ends, longest, what: lane.what, mb: lane.mb, whats: data.whats };
}

// Rows with their lanes' places, and which of a rank's model chunks each stage is.
function layOut(data) {
  const streams = [...new Set(data.rows.flatMap((row) => row.lanes.map((lane) => lane.stream)))];
  const thin = streams.filter((stream) => stream !== "compute");
  const units = 1 + THIN * thin.length;
  const rowPx = Math.min(ROW_PX[1] * units * 0.8, Math.max(ROW_PX[0], ALL_ROWS_PX / data.rows.length));
  const tall = (rowPx * 0.88) / units;
  return data.rows.map((row, number) => {
    const top = number * rowPx;
    const lanes = row.lanes.map((lane) => {
      const place = thin.indexOf(lane.stream);
      const y = place < 0 ? top : top + tall + place * tall * THIN;
      return { ...decodeLane(lane, data), y, high: place < 0 ? tall : tall * THIN };
    });
    const computes = lanes.find((lane) => lane.stream === "compute" && lane.what);
    const stages = new Set(computes ? computes.what.map((i) => data.whats[i][2]) : []);
    const chunks = [...stages].filter((stage) => stage >= 0).sort((a, b) => a - b);
    return { label: row.label, ranks: row.ranks, top, high: rowPx, tall, lanes, chunks };
  });
}

function spanName(lane, i) {
  const [pattern] = lane.whats[lane.what[i]];
  return pattern.replace("{m}", lane.mb[i]);
}

// The first span that may still be running at a time: spans are in order of their starts.
function firstSpan(lane, ticks) {
  let low = 0, high = lane.starts.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lane.starts[middle] + lane.longest < ticks) low = middle + 1;
    else high = middle;
  }
  return low;
}

function spanAt(lane, ticks) {
  for (let i = firstSpan(lane, ticks); i < lane.starts.length && lane.starts[i] <= ticks; i++) {
    if (lane.ends[i] >= ticks) return i;
  }
  return -1;
}

function mixed(color, ground, share) {
  const part = (text, i) => parseInt(text.slice(i, i + 2), 16);
  const one = (i) => Math.round(part(color, i) * (1 - share) + part(ground, i) * share);
  return `rgb(${one(1)},${one(3)},${one(5)})`;
}

function textOn(color) {
  const [r, g, b] = color.match(/\d+/g).map((v) => (v / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}

// Every kind's colour for each of a rank's chunks: the first is the darkest.
function inks(data, colors, ground) {
  const kinds = data.kinds.map((kind) => colors[kind] ?? colors.other);
  const known = new Map();
  // On a dark ground the later chunks must not sink into it.
  const [step, most] = parseInt(ground.slice(1, 3), 16) > 127 ? [0.17, 0.55] : [0.11, 0.38];
  return (kind, chunk) => {
    const key = kind * 64 + chunk;
    if (!known.has(key)) known.set(key, mixed(kinds[kind], ground, Math.min(most, step * chunk)));
    return known.get(key);
  };
}

function drawBins(ink, lane, view, context) {
  const number = lane.bins.length / 2;
  const first = Math.max(0, Math.floor((view.from / view.ticks) * number));
  const last = Math.min(number, Math.ceil((view.to / view.ticks) * number));
  for (let i = first; i < last; i++) {
    const level = lane.bins.charCodeAt(2 * i + 1) - 48;
    if (!level) continue;
    const left = view.x((i / number) * view.ticks);
    context.globalAlpha = 0.15 + (0.85 * level) / 9;
    context.fillStyle = ink(lane.bins.charCodeAt(2 * i) - 97, 0);
    context.fillRect(left, lane.y, view.x(((i + 1) / number) * view.ticks) - left + 0.3, lane.high);
  }
  context.globalAlpha = 1;
}

function drawSpans(ink, row, lane, view, context) {
  const tall = lane.stream === "compute";
  const size = Math.min(12, lane.high * 0.62);
  context.font = `${size}px system-ui, sans-serif`;
  for (let i = firstSpan(lane, view.from); i < lane.starts.length && lane.starts[i] <= view.to; i++) {
    if (lane.ends[i] < view.from) continue;
    const left = Math.max(view.left, view.x(lane.starts[i]));
    const wide = Math.min(view.right, view.x(lane.ends[i])) - left;
    const [, kind, stage] = lane.whats[lane.what[i]];
    const color = ink(kind, tall && stage >= 0 ? Math.max(0, row.chunks.indexOf(stage)) : 0);
    context.fillStyle = color;
    context.fillRect(left, lane.y, wide > 4 ? wide - 0.7 : wide, lane.high);
    if (size < 7 || wide < 11) continue;
    const long = spanName(lane, i);
    const short = lane.mb[i] >= 0 ? String(lane.mb[i]) : "";
    const text = context.measureText(long).width < wide - 5 ? long : short;
    if (text && context.measureText(text).width < wide - 3) {
      context.fillStyle = textOn(color);
      context.fillText(text, left + wide / 2, lane.y + lane.high / 2 + size * 0.36);
    }
  }
}

// A round step of time, so that some eight of them fill the view.
function timeStep(span) {
  const size = 10 ** Math.floor(Math.log10(span / 8));
  return [1, 2, 5, 10].map((factor) => factor * size).find((step) => span / step <= 10);
}

// A time in the unit that suits a span, to a step of its axis, or `fine` of one.
function seconds(value, span, fine = 1) {
  const [unit, size] = span >= 1.5 ? ["s", 1] : span >= 1.5e-3 ? ["ms", 1e-3] : ["µs", 1e-6];
  const digits = Math.max(0, Math.ceil(-Math.log10((fine * timeStep(span)) / size) - 1e-9));
  return `${(value / size).toFixed(digits)} ${unit}`;
}

function drawAxis(view, context, height, paint) {
  const from = (view.from / view.ticks) * view.end_s, to = (view.to / view.ticks) * view.end_s;
  const step = timeStep(to - from);
  context.font = "11px system-ui, sans-serif";
  for (let k = Math.ceil(from / step); k * step <= to; k++) {
    const x = view.x(((k * step) / view.end_s) * view.ticks);
    context.fillStyle = paint.line;
    context.fillRect(x, 0, 1, height + 4);
    context.fillStyle = paint.muted;
    const text = seconds(k * step, to - from);
    const half = context.measureText(text).width / 2;
    context.fillText(text, Math.min(Math.max(x, view.left + half), view.right - half), height + 18);
  }
}

function drawChart(context, rows, data, view, colors, paint) {
  const height = rows.length * rows[0].high;
  const ink = inks(data, colors, paint.ground);
  context.fillStyle = paint.ground;
  context.fillRect(0, 0, view.right + 20, height + AXIS_PX);
  context.textAlign = "center";
  drawAxis(view, context, height, paint);
  const every = Math.ceil(12 / rows[0].high);
  rows.forEach((row, number) => {
    context.fillStyle = colors.idle;
    context.fillRect(view.left, row.top, view.right - view.left, row.tall);
    for (const lane of row.lanes) {
      if (lane.bins !== undefined) drawBins(ink, lane, view, context);
      else drawSpans(ink, row, lane, view, context);
    }
    if (number % every === 0) {
      context.font = "11px system-ui, sans-serif";
      context.fillStyle = paint.text;
      context.textAlign = "right";
      context.fillText(row.label, view.left - 7, row.top + Math.min(row.high / 2, 12) + 4, view.left - 10);
      context.textAlign = "center";
    }
  });
}
