// The page of all runs: sorting, filtering, and curves of the chosen runs over each other, from the JSON in #data.
// What the reader chose is kept over the page's own reloads. Names are only ever set as text.
(() => {
  "use strict";
  const { colors, runs } = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const table = find("runs"), metric = find("metric"), across = find("across"), filter = find("filter");
  const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
  const DASHES = ["", "7 3", "2 3", "9 3 2 3"], SHOWN = 8, KEY = "sslvit runs " + location.pathname;

  // ---- what the reader chose
  let view = { sort: "", down: false, filter: "", metric: "", across: "images", logX: false, logY: null, chosen: null,
    hidden: [] };  // logY null: if the values need it
  try { view = { ...view, ...JSON.parse(sessionStorage.getItem(KEY)) }; } catch { /* nothing kept */ }
  const keep = () => { try { sessionStorage.setItem(KEY, JSON.stringify(view)); } catch { /* only not kept */ } };

  // ---- the table
  const box = (row) => row.cells[0].firstElementChild;
  const title = (head) => head.textContent.trim();

  function sort() {
    const place = heads.findIndex((head) => head.firstElementChild && title(head) === view.sort);
    heads.forEach((head, i) => {
      if (head.firstElementChild)
        head.setAttribute("aria-sort", i !== place ? "none" : view.down ? "descending" : "ascending");
    });
    if (place < 0) return;
    const numeric = heads[place].className === "number", sign = view.down ? -1 : 1;
    const key = (row) => row.cells[place].dataset.key;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);  // unknown ones come last
      return sign * (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true }));
    };
    table.tBodies[0].append(...[...rows].sort(order));
  }

  function filtered() {
    const words = view.filter.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    find("count").textContent = words.length ? `${shown} of ${rows.length}` : "";
  }

  heads.forEach((head) => head.firstElementChild?.addEventListener("click", () => {
    const again = view.sort === title(head);
    view.down = again ? !view.down : head.className === "number";  // the greatest number first
    view.sort = title(head);
    keep(); sort();
  }));
  filter.addEventListener("input", () => { view.filter = filter.value; keep(); filtered(); });

  // ---- the curves
  const named = (name) => Object.keys(runs.find((run) => run.name === name)?.metrics || {});
  const all = [...new Set(runs.flatMap((run) => Object.keys(run.metrics || {})))];
  const evaluated = all.filter((name) => name.endsWith("%"));
  for (const [label, names] of [["Training", all.filter((name) => !name.endsWith("%"))], ["Evaluation", evaluated]]) {
    const group = document.createElement("optgroup");
    group.label = label;
    group.append(...names.map((name) => new Option(name)));
    if (names.length) metric.append(group);
  }
  const healthy = rows.map((row) => runs[row.dataset.run]).filter((run) => run.state !== "diverged");
  view.chosen ??= healthy.map((run) => run.name).filter((name) => named(name).length).slice(0, SHOWN);
  metric.value = all.includes(view.metric) ? view.metric : all.includes("loss") ? "loss" : all[0] || "";
  across.value = view.across; filter.value = view.filter;
  for (const row of rows) {
    const name = runs[row.dataset.run].name;
    box(row).checked = view.chosen.includes(name);
    box(row).disabled = !named(name).length;
    box(row).addEventListener("change", (event) => {
      view.chosen = view.chosen.filter((one) => one !== name).concat(event.target.checked ? [name] : []);
      keep(); draw();
    });
  }
  metric.addEventListener("change", () => { view.metric = metric.value; keep(); draw(); });
  across.addEventListener("change", () => { view.across = across.value; keep(); draw(); });
  find("logX").addEventListener("change", (event) => { view.logX = event.target.checked; keep(); draw(); });
  find("logY").addEventListener("change", (event) => { view.logY = event.target.checked; keep(); draw(); });

  function hours(run, step) {  // between two lines of the log, evenly
    const times = run.time;
    let i = times.findIndex(([at]) => at >= step);
    if (i <= 0) i = 1;
    const [before, after] = [times[i - 1] || [0, 0], times[i] || times[i - 1] || [1, 0]];
    const share = (step - before[0]) / (after[0] - before[0] || 1);
    return Math.max(0, before[1] + share * (after[1] - before[1])) / 3600;
  }

  const to = { steps: (run, step) => step, images: (run, step) => step * run.batch, hours };
  const curvesNow = () => view.chosen.map((name, i) => {
    const run = runs.find((one) => one.name === name), [steps, values] = run?.metrics?.[metric.value] || [[], []];
    const points = steps.map((step, k) => [to[across.value](run, step), values[k]]);
    const look = { stroke: colors[i % colors.length], "stroke-dasharray": DASHES[Math.floor(i / colors.length) % 4] };
    return { name, points, look, hidden: view.hidden.includes(name) };
  }).filter((curve) => curve.points.length);

  const svg = (tag, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  function ticks(low, high, count) {  // round numbers inside the range
    const span = high - low || Math.abs(high) || 1, power = 10 ** Math.floor(Math.log10(span / count));
    const step = power * ([1, 2, 5].find((f) => span / (power * f) <= count) || 10), list = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) list.push(+(i * step).toPrecision(12));
    return list;
  }

  const label = (value) => value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
    ? value.toExponential(2).replace(/\.?0*e\+?/, "e") : value.toLocaleString("en", { maximumSignificantDigits: 4 });

  const wide = (value) => value < 1e5 ? label(value) : value.toLocaleString("en", { notation: "compact" });  // 1.2M images

  // An axis from pixel `from` to `until`: round ends, ticks, and where a value is.
  function axis(values, from, until, count, log, zero) {
    let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    let marks;
    if (log) {
      if (low === high) [low, high] = [low / 2, high * 2];
      const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
      const parts = last - first <= 2 ? [1, 2, 5] : [1], every = Math.max(1, Math.round((last - first) / count));
      marks = [];
      for (let power = first; power <= last; power += every) marks.push(...parts.map((part) => part * 10 ** power));
      marks = marks.filter((mark) => mark >= low * .999 && mark <= high * 1.001);
    } else {
      if (zero) low = Math.min(low, 0);
      const found = ticks(low, high, count), gap = found.length > 1 ? found[1] - found[0] : Math.abs(high) || 1;
      if (!zero) [low, high] = [Math.floor(low / gap + 1e-9) * gap, Math.ceil(high / gap - 1e-9) * gap];
      if (low === high) high = low + gap;
      marks = ticks(low, high, count + 1);
    }
    const to = log ? Math.log10 : Number, [a, b] = [to(low), to(high)];
    return { marks, at: (value) => from + (to(value) - a) / (b - a || 1) * (until - from),
      value: (at) => { const v = a + (at - from) / (until - from) * (b - a); return log ? 10 ** v : v; } };
  }

  function draw() {
    const curves = curvesNow(), drawn = curves.filter((curve) => !curve.hidden);
    const all = drawn.flatMap((curve) => curve.points.map(([, y]) => y)), least = Math.min(...all), most = Math.max(...all);
    const logY = view.logY ?? (least > 0 && most > 100 * least);
    find("logX").checked = view.logX;
    find("logY").checked = logY;
    for (const curve of drawn)  // a logarithm has no place for others
      curve.points = curve.points.filter(([x, y]) => (x > 0 || !view.logX) && (y > 0 || !logY));
    const points = drawn.flatMap((curve) => curve.points);
    const width = find("chart").clientWidth, height = Math.max(280, Math.min(420, width * .55));
    const [left, right, top, bottom] = [64, width - 14, 12, height - 44];
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img",
      "aria-label": `${metric.value} over ${across.value}: ${drawn.map((curve) => curve.name).join(", ")}` });
    legend(curves);
    find("chart").replaceChildren(picture);
    if (!points.length) {
      picture.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "Choose runs in the table below."));
      return;
    }
    const along = axis(points.map(([x]) => x), left, right, Math.max(2, Math.min(6, width / 110)), view.logX, true);
    const up = axis(points.map(([, y]) => y), bottom, top, 5, logY, false), x = along.at, y = up.at;
    for (const mark of up.marks) picture.append(
      svg("line", { class: "grid", x1: left, x2: right, y1: y(mark), y2: y(mark) }),
      svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, label(mark)));
    for (const mark of along.marks) {
      const at = x(mark), anchor = at > right - 20 ? "end" : "middle";
      picture.append(svg("text", { x: anchor === "end" ? right + 8 : at, y: bottom + 18, "text-anchor": anchor }, wide(mark)));
    }
    picture.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      svg("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, across.value),
      svg("text", { transform: "rotate(-90)", x: -(top + bottom) / 2, y: 12, "text-anchor": "middle" }, metric.value));
    for (const curve of drawn) {
      const places = curve.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`);
      const line = svg("polyline", { points: places.join(" "), fill: "none", "stroke-width": 1.8, "stroke-linejoin": "round", ...curve.look });
      line.append(svg("title", {}, curve.name));
      picture.append(line);
      if (places.length <= 20) for (const place of places) {
        const [cx, cy] = place.split(",");
        picture.append(svg("circle", { cx, cy, r: 3, fill: curve.look.stroke }));
      }
    }
    const guide = svg("line", { class: "guide", y1: top, y2: bottom, visibility: "hidden" });
    picture.append(guide);
    picture.addEventListener("pointermove", (event) => {
      const at = Math.max(left, Math.min(right, event.offsetX));
      guide.setAttribute("x1", at); guide.setAttribute("x2", at); guide.setAttribute("visibility", "visible");
      values(drawn, along.value(at));
    });
    picture.addEventListener("pointerleave", () => { guide.setAttribute("visibility", "hidden"); values(drawn, Infinity); });
  }

  function legend(curves) {
    find("legend").replaceChildren(...curves.map((curve) => {
      const item = document.createElement("li"), button = document.createElement("button");
      const swatch = svg("svg", { viewBox: "0 0 28 8", "aria-hidden": "true" });
      swatch.append(svg("line", { x1: 0, x2: 28, y1: 4, y2: 4, "stroke-width": 2.5, ...curve.look }));
      const name = document.createElement("bdi"), value = document.createElement("output");
      name.textContent = curve.name; name.title = curve.name;
      value.textContent = label(curve.points.at(-1)[1]);
      button.append(swatch, name, value);
      button.type = "button";
      button.setAttribute("aria-pressed", String(!curve.hidden));
      button.addEventListener("click", () => {
        view.hidden = curve.hidden ? view.hidden.filter((one) => one !== curve.name) : [...view.hidden, curve.name];
        keep(); draw();
      });
      item.append(button);
      return item;
    }));
  }

  function values(drawn, at) {  // in the legend: each curve's last value up to there
    const outputs = new Map([...find("legend").children].map((item) => [item.querySelector("bdi").textContent, item]));
    for (const curve of drawn) {
      const before = curve.points.filter(([place]) => place <= at);
      outputs.get(curve.name).querySelector("output").textContent = before.length ? label(before.at(-1)[1]) : "";
    }
  }

  sort(); filtered(); draw();
  addEventListener("resize", draw);
})();
