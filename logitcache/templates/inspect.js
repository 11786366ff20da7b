"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NAMES = ["BLENDED", "T1_ONLY", "GOLD_FALLBACK", "SKIP"];
  const both = data.teachers.length === 2;
  const by = (id) => document.getElementById(id);
  const rows = [...document.querySelectorAll(".row")];
  const spans = rows.map((row) => [...row.querySelectorAll(".t")]);
  let [js, confidence] = data.start; // edges, by number

  // Cell (j, c) holds js_edges[j] <= JS < js_edges[j + 1] and edges[c - 1] < confidence <= edges[c].
  const strategy = (j, c, gold) =>
    !both ? 1 : j < js ? 0 : c > confidence ? 1 : gold ? 2 : 3;

  const bar = (edge) => Math.min(Math.floor(edge * data.bars + 1e-6), data.bars - 1);
  const jsBar = data.js_edges.map(bar);
  const confidenceBar = [0, ...data.confidence_edges].map(bar);

  function drawBars(id, shares) {
    const plot = by(id);
    if (!plot) return;
    const most = Number(plot.dataset.most), bottom = 210, inside = 180; // of plots.py
    const below = new Array(data.bars).fill(0);
    plot.querySelectorAll("g[data-stack]").forEach((group, s) => {
      [...group.children].forEach((rect, n) => {
        const height = (shares[s][n] / most) * inside;
        rect.setAttribute("y", bottom - (below[n] / most) * inside - height);
        rect.setAttribute("height", height);
        below[n] += shares[s][n];
      });
    });
  }

  function count() {
    const empty = () => NAMES.map(() => new Array(data.bars).fill(0));
    const totals = NAMES.map(() => 0), byJs = empty(), byConfidence = empty();
    let all = 0;
    for (let at = 0; at < data.cells.length; at += 4) {
      const [j, c, gold, number] = data.cells.slice(at, at + 4);
      const s = strategy(j, c, gold);
      totals[s] += number;
      byJs[s][jsBar[j]] += number;
      byConfidence[s][confidenceBar[c]] += number;
      all += number;
    }
    const share = (list) => list.map((number) => number / Math.max(all, 1));
    return { totals: share(totals), byJs: byJs.map(share), byConfidence: byConfidence.map(share) };
  }

  function update() {
    const found = count();
    by("js-value").textContent = data.js_edges[js];
    by("confidence-value").textContent = data.confidence_edges[confidence];
    let x = 0;
    NAMES.forEach((name, s) => {
      by("share-" + name).textContent = (100 * found.totals[s]).toFixed(1) + "\u2009%";
      by("stack-" + name).setAttribute("x", x);
      by("stack-" + name).setAttribute("width", 100 * found.totals[s]);
      x += 100 * found.totals[s];
    });
    drawBars("js-plot", found.byJs);
    drawBars("confidence-plot", found.byConfidence);
    const cutX = 424 * Math.min(data.js_edges[js], 1);
    const cutY = 250 * (1 - data.confidence_edges[confidence]);
    const place = (id, values) => {
      for (const [key, value] of Object.entries(values)) by(id).setAttribute(key, value);
    };
    place("cut-js", { x1: cutX, x2: cutX });
    place("cut-confidence", { x1: cutX, x2: 424, y1: cutY, y2: cutY });
    const right = Math.min(cutX + 6, 290);
    place("name-BLENDED", { x: Math.max(cutX - 70, 4), display: cutX < 76 ? "none" : "inline" });
    place("name-T1_ONLY", { x: right, y: 14, display: cutY < 18 ? "none" : "inline" });
    place("name-OTHERS", { x: right, y: 244, display: cutY > 232 ? "none" : "inline" });
    data.rows.forEach((facts, r) => facts.forEach((fact, t) => {
      if (fact) spans[r][t].classList.replace(
        [...spans[r][t].classList].find((name) => /^s\d$/.test(name)),
        "s" + strategy(fact[0], fact[1], fact[3]),
      );
    }));
  }

  // ---- tooltip ----

  const tip = by("tip");
  let current = null;
  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const show = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : p >= 0.00095 ? (100 * p).toFixed(1) : p ? "<0.1" : "0") + "\u2009%";

  function fill(fact) {
    const [j, c, divergence, gold, token] = fact;
    const first = element("p");
    first.append(element("span", data.pieces[token], "tokens mono"),
      both ? `  JS ${divergence.toFixed(3)} bits \u00b7 ${NAMES[strategy(j, c, gold)]}` : "", gold ? " \u00b7 gold label" : "");
    const columns = element("div", undefined, "columns");
    data.teachers.forEach((name, teacher) => {
      const [sure, real, top] = fact.slice(5 + 3 * teacher, 8 + 3 * teacher);
      const column = element("div"), list = element("ol");
      const head = element("h4", `teacher ${teacher + 1}`);
      head.append(element("span", `confidence ${sure.toFixed(2)}`));
      column.append(head, list);
      const line = (id, p) => {
        const item = element("li", undefined, id === token ? "real" : "");
        const size = element("span", undefined, "bar");
        size.style.width = 100 * p + "%";
        item.append(size, element("span", data.pieces[id], "mono"), element("span", show(p)));
        list.append(item);
      };
      for (let at = 0; at < top.length; at += 2) line(top[at], top[at + 1]);
      if (!top.some((id, at) => at % 2 === 0 && id === token)) {
        list.append(element("li", "\u2026"));
        line(token, real);
      }
      columns.append(column);
    });
    tip.className = both ? "" : "one";
    tip.replaceChildren(first, columns);
  }

  function point(r, t) {
    if (current) current.classList.remove("at");
    current = null;
    const fact = r === null ? null : data.rows[r][t];
    tip.hidden = !fact;
    if (!fact) return;
    current = spans[r][t];
    current.classList.add("at");
    fill(fact);
    const box = current.getClientRects()[0] || current.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
    const below = box.bottom + tip.offsetHeight + 12 < window.innerHeight;
    tip.style.left = Math.max(left, 12) + window.scrollX + "px";
    tip.style.top = (below ? box.bottom + 8 : box.top - tip.offsetHeight - 8) + window.scrollY + "px";
  }

  rows.forEach((row, r) => {
    let at = -1;
    row.addEventListener("pointerover", (event) => {
      const t = spans[r].indexOf(event.target.closest(".t"));
      if (t >= 0) point(r, (at = t));
    });
    row.addEventListener("pointerleave", () => point(null));
    row.addEventListener("blur", () => point(null));
    row.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") point(null);
      if (!step) return;
      event.preventDefault();
      let next = at + step;
      while (next >= 0 && next < spans[r].length && !data.rows[r][next]) next += step;
      if (next < 0 || next >= spans[r].length) return;
      at = next;
      spans[r][at].scrollIntoView({ block: "nearest" });
      point(r, at);
    });
  });

  if (both) {
    const slider = (id, edges, start, set) => {
      const input = by(id);
      input.max = edges.length - 1;
      input.value = start;
      input.addEventListener("input", () => {
        set(Number(input.value));
        input.setAttribute("aria-valuetext", edges[Number(input.value)]);
        update();
      });
    };
    slider("js", data.js_edges, js, (value) => (js = value));
    slider("confidence", data.confidence_edges, confidence, (value) => (confidence = value));
    update();
  }
})();
