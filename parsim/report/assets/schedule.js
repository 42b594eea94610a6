// Schedule charts, use: zooming and moving by mouse and keys, reading single tasks.

const LEAST_TICKS = 40;

class ScheduleChart {
  constructor(figure) {
    this.figure = figure;
    this.data = JSON.parse(document.getElementById(figure.dataset.schedule).textContent);
    this.canvas = figure.querySelector("canvas");
    this.rows = layOut(this.data);
    this.from = 0;
    this.to = this.data.ticks;
    this.picked = null;
    this.drag = null;
    this.printing = false;
    this.listen();
    this.draw();
  }

  listen() {
    const { canvas, figure } = this;
    const deeds = {
      in: () => this.zoom(0.5), out: () => this.zoom(2), all: () => this.show(0, this.data.ticks),
      left: () => this.move(-0.25), right: () => this.move(0.25),
    };
    for (const button of figure.querySelectorAll("[data-do]")) {
      button.addEventListener("click", deeds[button.dataset.do]);
    }
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.hover(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", () => this.cancel());
    canvas.addEventListener("pointerleave", hideTip);
    canvas.addEventListener("dblclick", () => this.show(0, this.data.ticks));
    new ResizeObserver(() => this.draw()).observe(figure);
    themeListeners.push(() => this.draw());
    addEventListener("beforeprint", () => this.print(true));
    addEventListener("afterprint", () => this.print(false));
  }

  print(printing) {
    this.printing = printing;
    this.draw();
  }

  view() {
    const wide = this.printing ? 700 : this.canvas.clientWidth || 800;
    const left = wide < 600 ? 66 : 104;
    const right = wide - 4;
    const scale = (right - left) / (this.to - this.from);
    const { ticks, end_s } = this.data;
    return { from: this.from, to: this.to, left, right, ticks, end_s, wide,
      x: (time) => left + (time - this.from) * scale,
      time: (x) => this.from + (x - left) / scale };
  }

  paint() {
    const style = getComputedStyle(document.documentElement);
    if (this.printing) return { ground: "#ffffff", text: "#000000", muted: "#444444", line: "#dddddd" };
    return Object.fromEntries(["surface", "text", "muted", "line"].map((name) =>
      [name === "surface" ? "ground" : name, style.getPropertyValue(`--${name}`).trim()]));
  }

  draw() {
    const view = this.view();
    const high = this.rows.length * this.rows[0].high + AXIS_PX;
    const ratio = this.printing ? 3 : devicePixelRatio || 1;
    this.canvas.width = Math.round(view.wide * ratio);
    this.canvas.height = Math.round(high * ratio);
    this.canvas.style.height = this.printing ? "auto" : high + "px";
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const paint = this.paint();
    const colors = THEMES[isDark() && !this.printing ? "dark" : "light"];
    drawChart(context, this.rows, this.data, view, colors, paint);
    this.drawPicked(context, view, paint);
    if (this.drag && this.drag.to !== this.drag.from) {
      context.globalAlpha = 0.25;
      context.fillStyle = paint.text;
      const left = Math.min(this.drag.from, this.drag.to);
      context.fillRect(left, 0, Math.abs(this.drag.to - this.drag.from), high - AXIS_PX);
    }
    const second = view.end_s / view.ticks;
    const span = (this.to - this.from) * second;
    this.canvas.dataset.from = this.from * second;
    this.canvas.dataset.to = this.to * second;
    this.figure.querySelector(".view").textContent =
      `${seconds(this.from * second, span, 0.1)} to ${seconds(this.to * second, span, 0.1)}`;
  }

  drawPicked(context, view, paint) {
    if (!this.picked) return;
    const { lane, i } = this.picked;
    const left = Math.max(view.left, view.x(lane.starts[i]));
    const right = Math.min(view.right, view.x(lane.ends[i]));
    if (right < left) return;
    context.strokeStyle = paint.text;
    context.lineWidth = 2;
    context.strokeRect(left, lane.y, Math.max(2, right - left), lane.high);
  }

  show(from, to) {
    const { ticks } = this.data;
    const span = Math.min(ticks, Math.max(LEAST_TICKS, to - from));
    this.from = Math.min(Math.max(0, from), ticks - span);
    this.to = this.from + span;
    this.draw();
  }

  zoom(factor, around = this.middle()) {
    const { from, to } = this;
    this.show(around - (around - from) * factor, around + (to - around) * factor);
  }

  middle() {
    const at = this.picked && (this.picked.lane.starts[this.picked.i] + this.picked.lane.ends[this.picked.i]) / 2;
    return at !== null && at > this.from && at < this.to ? at : (this.from + this.to) / 2;
  }

  move(share) {
    const by = (this.to - this.from) * share;
    this.show(this.from + by, this.to + by);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    const across = event.key === "ArrowLeft" || event.key === "ArrowRight";
    if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-" || event.key === "_") this.zoom(2);
    else if (event.key === "0" || event.key === "Home") this.show(0, this.data.ticks);
    else if (step && event.shiftKey && across) this.move(step * 0.25);
    else if (step && across) this.pickNext(step);
    else if (step) this.pickLane(step);
    else if (event.key === "Escape") this.pick(null);
    else return;
    event.preventDefault();
  }

  // The lanes whose tasks are known one by one, from the top down.
  lanes() {
    return this.rows.flatMap((row) =>
      row.lanes.filter((lane) => lane.starts).map((lane) => ({ row, lane })));
  }

  pickNext(step) {
    if (!this.picked) return this.pickLane(1);
    const { row, lane, i } = this.picked;
    const next = Math.min(Math.max(0, i + step), lane.starts.length - 1);
    this.pick({ row, lane, i: next });
  }

  pickLane(step) {
    const lanes = this.lanes();
    if (!lanes.length) return;
    const at = this.picked ? lanes.findIndex((each) => each.lane === this.picked.lane) : -step;
    const { row, lane } = lanes[Math.min(Math.max(0, this.picked ? at + step : 0), lanes.length - 1)];
    const time = this.picked ? this.picked.lane.starts[this.picked.i] : this.from;
    let i = Math.min(firstSpan(lane, time), lane.starts.length - 1);
    while (i < lane.starts.length - 1 && lane.ends[i] < time) i++;
    this.pick({ row, lane, i });
  }

  pick(picked) {
    this.picked = picked;
    this.figure.querySelector(".readout").textContent = picked ? this.describe(picked) : "";
    if (picked) {
      const start = picked.lane.starts[picked.i], end = picked.lane.ends[picked.i];
      const span = this.to - this.from;
      if (start < this.from || end > this.to) {
        const middle = (start + end) / 2;
        return this.show(middle - span / 2, middle + span / 2);
      }
    }
    this.draw();
  }

  describe({ row, lane, i }) {
    const [, kind, stage] = lane.whats[lane.what[i]];
    const second = this.data.end_s / this.data.ticks;
    const [start, end] = [lane.starts[i] * second, lane.ends[i] * second];
    const where = [`${row.label}, ${lane.stream}`];
    if (stage >= 0) where.push(`stage ${stage}`);
    if (lane.mb[i] >= 0) where.push(`micro-batch ${lane.mb[i]}`);
    return `${spanName(lane, i)}: ${this.data.kinds[kind].replace("_", " ")}, ` +
      `${seconds(end - start, end - start)}\n${where.join(", ")}\n` +
      `${seconds(start, this.data.end_s / 1e3)} to ${seconds(end, this.data.end_s / 1e3)}`;
  }

  describeBin(row, lane, time) {
    const i = Math.min(lane.bins.length / 2 - 1, Math.floor((time / this.data.ticks) * (lane.bins.length / 2)));
    const share = Math.round(((lane.bins.charCodeAt(2 * i + 1) - 48) / 9) * 100);
    if (!share) return "";
    const kind = this.data.kinds[lane.bins.charCodeAt(2 * i) - 97].replace("_", " ");
    return `${row.label}, ${lane.stream}\nbusy up to ${share}% of this moment, mostly with ${kind}`;
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    const view = this.view();
    const row = this.rows[Math.floor(y / this.rows[0].high)];
    const lane = row?.lanes.find((each) => y >= each.y && y < each.y + each.high);
    return { x: Math.min(Math.max(x, view.left), view.right), row, lane, time: view.time(x), view };
  }

  press(event) {
    if (event.button !== 0 || event.pointerType === "touch") return;
    const { x } = this.at(event);
    this.drag = { from: x, to: x };
    this.canvas.setPointerCapture(event.pointerId);
    hideTip();
  }

  hover(event) {
    const { x, row, lane, time } = this.at(event);
    if (this.drag) {
      this.drag.to = x;
      return this.draw();
    }
    let text = "";
    if (lane?.bins !== undefined) text = this.describeBin(row, lane, time);
    else if (lane) {
      const i = spanAt(lane, time);
      if (i >= 0) text = this.describe({ row, lane, i });
    }
    if (text) showTip(text, event.clientX, event.clientY);
    else hideTip();
  }

  release(event) {
    const drag = this.drag;
    this.drag = null;
    if (!drag) return;
    const { view, row, lane, time } = this.at(event);
    if (Math.abs(drag.to - drag.from) > 5) {
      const ends = [view.time(drag.from), view.time(drag.to)].sort((a, b) => a - b);
      return this.show(...ends);
    }
    const i = lane?.starts ? spanAt(lane, time) : -1;
    this.pick(i >= 0 ? { row, lane, i } : null);
  }

  cancel() {
    this.drag = null;
    this.draw();
  }

  wheel(event) {
    const across = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
    if (event.ctrlKey || event.metaKey) {
      this.zoom(Math.exp(Math.sign(event.deltaY) * 0.3), this.at(event).time);
    } else if (Math.abs(across) > (event.shiftKey ? 0 : Math.abs(event.deltaY))) {
      this.move(Math.sign(across) * 0.1);
    } else {
      return;
    }
    event.preventDefault();
  }
}

for (const figure of document.querySelectorAll("[data-schedule]")) new ScheduleChart(figure);
