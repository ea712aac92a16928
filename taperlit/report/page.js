// Shows the values under the pointer, draws one cursor through all charts of a run, and lets legends hide lines.
(() => {
  "use strict";
  const MOST = 12; // lines in the tip: those nearest to the pointer
  const tip = document.getElementById("tip");
  const SVG = "http://www.w3.org/2000/svg";

  function scaleOf([low, high, start, end, log]) {
    const f = log ? Math.log : (v) => v;
    const unit = (end - start) / (f(high) - f(low));
    return { at: (v) => start + (f(v) - f(low)) * unit, from: (px) => low + (px - start) / unit };
  }

  function nearest(sorted, value) {
    let low = 0, high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < value) low = middle + 1; else high = middle;
    }
    return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
  }

  function element(name, text) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text; // never as markup: names come from files
    return made;
  }

  function key(look) {
    const svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
    svg.setAttribute("class", `key ${look}`);
    svg.setAttribute("viewBox", "0 0 24 10");
    path.setAttribute("d", "M1 5H23");
    svg.append(path);
    return svg;
  }

  const charts = [...document.querySelectorAll("figure.chart")].map((figure) => {
    const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    return {
      figure, data, x: scaleOf(data.x), y: scaleOf(data.y), svg: figure.querySelector(":scope > svg"),
      run: figure.closest(".run"), cursor: figure.querySelector(".cursor"), hidden: new Set(),
    };
  });

  function shown(value, percent) {
    if (typeof value !== "number") return value;
    return percent ? `${(100 * value).toFixed(2)}%` : String(Number(value.toPrecision(5)));
  }

  function point(chart, event) {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.svg.getScreenCTM().inverse());
    const step = Math.round(chart.x.from(place.x));
    const rows = chart.data.series.flatMap((line, i) => {
      if (chart.hidden.has(i)) return [];
      const k = nearest(line.steps, step), value = line.values[k];
      const away = typeof value === "number" ? Math.abs(chart.y.at(value) - place.y) : Infinity;
      return [{ line, step: line.steps[k], value, away: Number.isNaN(away) ? Infinity : away }];
    });
    rows.sort((a, b) => a.away - b.away);
    return { step: rows.length ? rows[0].step : step, rows: rows.slice(0, MOST), left: rows.length - MOST };
  }

  function show(chart, event) {
    const { step, rows, left } = point(chart, event);
    for (const other of charts) {
      const on = other.run === chart.run && step <= other.data.x[1];
      other.cursor.classList.toggle("on", on);
      for (const end of ["x1", "x2"]) other.cursor.setAttribute(end, other.x.at(step));
    }
    const zone = chart.data.zones.find(([, first, last]) => first < step && step <= last);
    const list = element("ul");
    rows.sort((a, b) => (b.value > a.value) - (b.value < a.value));
    for (const row of rows) {
      const item = element("li");
      const at = row.step === step ? "" : ` (step ${row.step.toLocaleString("en")})`;
      item.append(key(row.line.look), element("span", row.line.name + at), element("b", shown(row.value, chart.data.percent)));
      list.append(item);
    }
    if (left > 0) list.append(element("li", `and ${left} further away`));
    tip.replaceChildren(element("div", `step ${step.toLocaleString("en")}${zone ? `, ${zone[0]}` : ""}`), list);
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const beside = event.clientX + 16 > room ? event.clientX - tip.offsetWidth - 16 : event.clientX + 16;
    tip.style.left = `${Math.max(8, Math.min(room, beside)) + scrollX}px`;
    tip.style.top = `${event.clientY + 16 + scrollY}px`;
  }

  function hide() {
    tip.hidden = true;
    for (const chart of charts) chart.cursor.classList.remove("on");
  }

  function toggle(chart, number, item) {
    const off = !chart.hidden.delete(number);
    if (off) chart.hidden.add(number);
    item.setAttribute("aria-pressed", String(!off));
    chart.svg.querySelector(`[data-series="${number}"]`).classList.toggle("off", off);
  }

  for (const chart of charts) {
    chart.svg.addEventListener("pointermove", (event) => show(chart, event));
    chart.svg.addEventListener("pointerdown", (event) => show(chart, event));
    chart.svg.addEventListener("pointerleave", hide);
    for (const item of chart.figure.querySelectorAll(".legend li")) {
      const number = Number(item.dataset.series);
      item.setAttribute("role", "button");
      item.setAttribute("tabindex", "0");
      item.setAttribute("aria-pressed", "true");
      item.addEventListener("click", () => toggle(chart, number, item));
      item.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        toggle(chart, number, item);
      });
    }
  }
  document.documentElement.dataset.charts = String(charts.length); // the script ran to its end
})();
