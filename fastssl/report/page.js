// Shows the values under the pointer (or chosen by arrow keys) and hides runs.  The page is complete without it.
(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const number = (v) => Math.abs(v) >= 1e6 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(2)
    : v.toLocaleString("en", { maximumSignificantDigits: 5 });

  const show = (rows, x, y) => {
    tip.replaceChildren(...rows.map(([name, value, mark]) => {
      const row = document.createElement("div");
      if (mark) {
        const swatch = document.createElement("i");
        swatch.className = "swatch";
        if (mark.startsWith("#")) swatch.style.setProperty("--c", mark); else swatch.classList.add(mark);
        row.append(swatch);
      }
      row.append(name);
      const bold = document.createElement("b");
      bold.textContent = value;
      row.append(bold);
      return row;
    }));
    tip.hidden = false;
    const left = x + 16 + tip.offsetWidth > innerWidth ? x - 16 - tip.offsetWidth : x + 16;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, Math.min(y + 14, innerHeight - tip.offsetHeight - 6)) + "px";
  };

  const nearest = (list, value) => {
    let low = 0, high = list.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] < value) low = middle + 1; else high = middle;
    }
    return low > 0 && value - list[low - 1] < list[low] - value ? low - 1 : low;
  };

  for (const svg of document.querySelectorAll("svg[data-lines]")) {
    const chart = JSON.parse(svg.dataset.lines), [left, , width] = chart.box, cursor = svg.querySelector(".cursor");
    let at = null;
    const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); at = null; };
    const point = (value, x, y) => {
      const shown = chart.s.filter((s) => s.r === undefined || !document.body.classList.contains("hide-" + s.r));
      if (!shown.length) return hide();
      const candidates = shown.map((s) => s.x[nearest(s.x, value)]);
      at = candidates.reduce((a, b) => Math.abs(b - value) < Math.abs(a - value) ? b : a);
      const px = left + width * (at - chart.x[0]) / ((chart.x[1] - chart.x[0]) || 1);
      cursor.setAttribute("x1", px);
      cursor.setAttribute("x2", px);
      cursor.setAttribute("visibility", "visible");
      const rows = shown.map((s) => [s.n, number(s.y[nearest(s.x, at)]) + (chart.u === "%" ? " %" : ""), s.c]);
      show([[chart.xl, number(at), ""], ...rows], x, y);
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const share = ((event.clientX - box.left) * scale - left) / width;
      point(chart.x[0] + Math.min(1, Math.max(0, share)) * (chart.x[1] - chart.x[0]), event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const list = chart.s.reduce((a, s) => s.x.length > a.length ? s.x : a, []), box = svg.getBoundingClientRect();
      const next = at === null ? 0 : Math.min(list.length - 1, Math.max(0, nearest(list, at) + step));
      point(list[next], box.left + box.width / 2, box.top + box.height / 2);
    });
  }

  for (const svg of document.querySelectorAll("svg[data-points]")) {
    const map = JSON.parse(svg.dataset.points), ring = svg.querySelector(".ring");
    const hide = () => { tip.hidden = true; ring.setAttribute("visibility", "hidden"); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      const distance = (p) => (p[0] - x) ** 2 + (p[1] - y) ** 2;
      const best = map.p.reduce((a, b) => distance(b) < distance(a) ? b : a);
      if (distance(best) > 200) return hide();
      ring.setAttribute("cx", best[0]);
      ring.setAttribute("cy", best[1]);
      ring.setAttribute("visibility", "visible");
      show([[map.names[best[2]], "", map.colours[best[2]]]], event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", hide);
  }

  for (const box of document.querySelectorAll("input[data-run]")) {
    const apply = () => document.body.classList.toggle("hide-" + box.dataset.run, !box.checked);
    box.addEventListener("change", apply);
    apply();
  }

  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
