"use strict";
(() => {
  const tip = document.getElementById("tip");

  const make = (name, text, kind) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };

  const shown = (value, unit) => {
    const size = Math.abs(value);
    const tiny = size !== 0 && (size < 1e-4 || size >= 1e15);
    const text = tiny ? value.toExponential(3) : value.toLocaleString("en", { maximumSignificantDigits: 5 });
    return unit ? `${text} ${unit}` : text;
  };

  // index of the entry of a rising list that is nearest to a value
  const nearest = (list, value) => {
    let low = 0;
    let high = list.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low > 0 && value - list[low - 1] <= list[low] - value ? low - 1 : low;
  };

  const read = (chart, step) => {
    const rows = [];
    let at = null;
    for (const curve of chart.curves) {
      const index = nearest(curve.x, step);
      const distance = Math.abs(curve.x[index] - step);
      if (at === null || distance < Math.abs(at - step)) at = curve.x[index];
      rows.push([curve, index]);
    }
    return [at, rows];
  };

  const show = (chart, event, step) => {
    const [at, rows] = read(chart, step);
    const table = make("table");
    const head = table.insertRow();
    head.append(make("td", "step"), make("td", at.toLocaleString("en")));
    for (const [curve, index] of rows) {
      const row = table.insertRow();
      const name = make("td");
      name.append(make("i", "", `key c${curve.colour}${curve.faint ? " faint" : ""}`), curve.name);
      const other = curve.x[index] === at ? "" : ` (at ${curve.x[index].toLocaleString("en")})`;
      row.append(name, make("td", shown(curve.y[index], chart.unit) + other));
    }
    tip.replaceChildren(table);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - 16 - box.width : event.clientX + 16;
    tip.style.left = `${Math.max(left, 4)}px`;
    tip.style.top = `${Math.min(Math.max(event.clientY - box.height - 12, 4), innerHeight - box.height - 4)}px`;
    const share = (at - chart.x[0]) / (chart.x[1] - chart.x[0]);
    document.documentElement.style.setProperty("--at", `${100 * share}%`);
    document.documentElement.style.setProperty("--seen", "0.8");
  };

  const hide = () => {
    tip.hidden = true;
    document.documentElement.style.setProperty("--seen", "0");
  };

  for (const element of document.querySelectorAll(".chart")) {
    const chart = JSON.parse(element.querySelector("script").textContent);
    const plot = element.querySelector(".plot");
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
      show(chart, event, chart.x[0] + share * (chart.x[1] - chart.x[0]));
    });
    plot.addEventListener("pointerleave", hide);
  }
  addEventListener("scroll", hide, { passive: true });

  for (const input of document.querySelectorAll(".search")) {
    const section = input.closest("section");
    const rows = [...section.querySelectorAll(".settings tr[data-key]")];
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const row of rows) {
        const text = `${row.dataset.key} ${row.textContent}`.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        count += !row.hidden;
      }
      for (const group of section.querySelectorAll(".settings .group")) {
        let row = group.nextElementSibling;
        let used = false;
        while (row && !row.classList.contains("group")) {
          used = used || (!row.hidden && row.querySelector(".inner") !== null);
          row = row.nextElementSibling;
        }
        group.hidden = !used;
      }
      section.querySelector(".found").textContent = words.length ? `${count} found` : "";
    });
  }
  document.documentElement.dataset.ready = document.querySelectorAll(".chart").length;
})();
