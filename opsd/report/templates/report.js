// Read-outs: what a chart says at a step, what the teacher preferred at a token. All text goes through textContent.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const charts = JSON.parse(document.getElementById("charts").textContent);
  let open = null; // the token or chart that the tip belongs to

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function row(left, right) {
    const made = element("div", undefined, "row");
    made.append(left, element("span", right));
    return made;
  }

  function show(owner, content, x, top, bottom) {
    if (open && open !== owner) hide();
    open = owner;
    tip.replaceChildren(...content);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const above = top - box.height - 8;
    tip.style.left = Math.max(8, Math.min(x - box.width / 2, innerWidth - box.width - 8)) + "px";
    tip.style.top = (above >= 8 ? above : Math.min(bottom + 8, innerHeight - box.height - 8)) + "px";
  }

  function hide() {
    if (open) open.classList.remove("on", "reading");
    open = null;
    tip.hidden = true;
  }

  // Tokens

  const quote = (text) => "“" + text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") + "”";
  const share = (p) => (100 * p).toFixed(p < 0.0995 || p > 0.995 ? 1 : 0) + " %";

  function showToken(token) {
    const { text, d, p, teacher } = token.dataset;
    const content = [row(element("code", quote(text)), d === undefined ? "" : Number(d).toPrecision(3) + " nats")];
    if (p !== undefined) content.push(row(element("span", "the student gave it"), share(Number(p))));
    if (teacher) {
      content.push(element("b", "The teacher preferred"));
      for (const [choice, probability] of JSON.parse(teacher)) {
        const bar = element("span", undefined, "share");
        bar.style.width = Math.max(1, 100 * probability) + "%";
        content.push(row(element("code", quote(choice)), share(probability)), bar);
      }
    }
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    show(token, content, box.left + box.width / 2, box.top, box.bottom);
    token.classList.add("on");
  }

  const tokenAt = (event) => event.target.closest?.(".tokens .t");

  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return; // a tap is a click
    const token = tokenAt(event);
    if (token) showToken(token);
    else if (open?.classList.contains("t")) hide();
  });
  document.addEventListener("focusin", (event) => {
    const token = tokenAt(event);
    if (token) showToken(token);
    else if (!event.target.closest?.("svg.chart")) hide();
  });
  document.addEventListener("click", (event) => {
    const token = tokenAt(event);
    if (token) showToken(token);
    else if (!event.target.closest?.("svg.chart")) hide();
  });

  // Charts

  function showChart(svg, index) {
    const chart = charts[svg.dataset.chart];
    const [x0, x1, left, right] = svg.dataset.x.split(" ").map(Number);
    const xs = places(chart);
    index = Math.max(0, Math.min(index, xs.length - 1));
    svg.dataset.at = index;
    const x = xs[index];
    const at = left + ((x - x0) / (x1 - x0)) * (right - left);
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    const say = (y) => (chart.percent ? (100 * y).toFixed(1) + " %" : Number(y.toPrecision(4)).toLocaleString("en"));
    const content = [element("div", Math.round(x).toLocaleString("en") + " " + chart.x.replace(/ \(.*/, ""))];
    if (chart.x === "step") content[0].textContent = "step " + x;
    for (const series of chart.series) {
      const point = nearest(series.points, x);
      if (!point) continue;
      const name = element("b", series.name + (point[0] === x ? "" : " at " + Math.round(point[0]).toLocaleString("en")));
      const interval = point.length === 4 ? ` (${(100 * point[2]).toFixed(1)}–${(100 * point[3]).toFixed(1)})` : "";
      content.push(row(name, say(point[1]) + interval));
    }
    const box = svg.getBoundingClientRect();
    show(svg, content, box.left + (at / svg.viewBox.baseVal.width) * box.width, box.top + 24, box.bottom);
    svg.classList.add("reading");
  }

  const places = (chart) =>
    (chart.places ??= [...new Set(chart.series.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b));

  function nearest(points, x) {
    let best = null;
    for (const point of points) if (!best || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
    return best;
  }

  for (const svg of document.querySelectorAll("svg.chart")) {
    const read = (event) => {
      const [x0, x1, left, right] = svg.dataset.x.split(" ").map(Number);
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const x = x0 + ((at - left) / (right - left)) * (x1 - x0);
      const xs = places(charts[svg.dataset.chart]);
      let index = 0;
      xs.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(xs[index] - x)) index = i; });
      showChart(svg, index);
    };
    svg.addEventListener("pointermove", read);
    svg.addEventListener("pointerdown", read);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch" && open === svg) hide(); });
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) showChart(svg, Infinity); });
    svg.addEventListener("blur", () => { if (open === svg) hide(); });
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const active = document.activeElement;
    if (!move || !active) return;
    if (active.matches(".tokens .t")) {
      const next = move < 0 ? active.previousElementSibling : active.nextElementSibling;
      if (!next) return;
      active.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      event.preventDefault();
    } else if (active.matches("svg.chart")) {
      showChart(active, Number(active.dataset.at ?? 0) + move);
      event.preventDefault();
    }
  });
  addEventListener("scroll", () => { if (open && !open.matches(":focus")) hide(); }, { passive: true });
})();
