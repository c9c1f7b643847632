"use strict";
(() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // --- numbers ---------------------------------------------------------------------------------

  const units = {
    s: [[3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"], [1e-6, "µs"]],
    bytes: [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]],
  };

  const plain = (value, digits) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e15)) return value.toExponential(Math.min(digits - 1, 3));
    return value.toLocaleString("en", { maximumSignificantDigits: digits });
  };

  const quantity = (value, unit, digits) => {
    if (!units[unit] || value === 0) return plain(value, digits);
    const [factor, name] = units[unit].find((one) => Math.abs(value) >= one[0]) ?? units[unit].at(-1);
    return `${plain(value / factor, digits)} ${name}`;
  };

  const ticks = (values, unit) => {
    const sizes = values.map(Math.abs);
    const isCompact = !unit && sizes.some((size) => size >= 1e4) && !sizes.some((size) => size >= 1e15);
    const compact = { notation: "compact", maximumSignificantDigits: 4 };
    return values.map((one) => (isCompact ? one.toLocaleString("en", compact) : quantity(one, unit, 4)));
  };

  // round values of a logarithmic axis
  const decades = (low, high) => {
    const powers = Array.from({ length: 640 }, (_, index) => 10 ** (index - 320));
    let values = [];
    for (const factors of [[1, 2, 5], [1, 3], [1]]) {
      values = powers.flatMap((power) => factors.map((one) => one * power));
      values = values.filter((one) => one >= low && one <= high);
      if (values.length <= 6) return values;
    }
    return values.filter((_, index) => index % Math.ceil(values.length / 5) === 0);
  };

  // 1, 2, 5, 10, … steps between the ticks of the step axis
  const stepIncrements = Array.from({ length: 15 }, (_, power) => [1, 2, 5].map((one) => one * 10 ** power)).flat();

  // --- charts ----------------------------------------------------------------------------------

  // index of a curve's point that is nearest to a step
  const nearest = (u, series, index, step) => {
    const values = u.data[series];
    let before = index;
    let after = index;
    while (before >= 0 && values[before] == null) before -= 1;
    while (after < values.length && values[after] == null) after += 1;
    if (before < 0 || after === values.length) return before < 0 ? after : before;
    return step - u.data[0][before] <= u.data[0][after] - step ? before : after;
  };

  const series = (chart, curve) => ({
    label: curve.name,
    stroke: () => css(`--c${curve.colour}`),
    width: { line: 1.7, faint: 1, dots: 1.4 }[curve.style],
    alpha: curve.style === "faint" ? 0.35 : 1,
    spanGaps: true,
    points: {
      show: curve.x.length === 1 || (curve.style === "dots" && curve.x.length <= 120),
      size: 5,
      fill: () => css(`--c${curve.colour}`),
    },
    value: (u, value, _, index) => {
      if (value == null) return "–";
      const step = u.data[0][index];
      const other = index === u.cursor.idx ? "" : ` (at ${step.toLocaleString("en")})`;
      return quantity(value, chart.unit, 5) + other;
    },
  });

  const axes = (chart) => {
    const style = {
      stroke: () => css("--soft"),
      font: "12px system-ui, sans-serif",
      ticks: { show: false },
      gap: 7,
      grid: { stroke: () => css("--grid"), width: 1 },
    };
    const steps = {
      ...style,
      size: 26,
      grid: { show: false },
      incrs: stepIncrements,
      values: (u, splits) => ticks(splits),
    };
    const values = { ...style, size: 66, values: (u, splits) => ticks(splits, chart.unit) };
    if (chart.log) {
      values.splits = (u, _, low, high) => decades(low, high);
      values.filter = (u, splits) => splits;
    }
    const epochs = {
      ...steps,
      scale: "x",
      side: 2,
      size: 20,
      gap: 2,
      space: 90,
      stroke: () => css("--faint"),
      splits: (u, _, low, high, step) => {
        const every = Math.max(Math.round(step / chart.epoch), 1) * chart.epoch;
        const first = Math.ceil(low / every);
        return Array.from({ length: Math.floor(high / every) - first + 1 }, (_, i) => (first + i) * every);
      },
      values: (u, splits) => ticks(splits.map((step) => step / chart.epoch)).map((text) => `epoch ${text}`),
    };
    return chart.epoch ? [steps, values, epochs] : [steps, values];
  };

  const resumed = (chart) => (u) => {
    u.ctx.save();
    u.ctx.strokeStyle = css("--faint");
    u.ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    u.ctx.beginPath();
    for (const step of chart.resumed) {
      const { min, max } = u.scales.x;
      if (step < min || step > max) continue;
      const x = u.valToPos(step, "x", true);
      u.ctx.moveTo(x, u.bbox.top);
      u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
    }
    u.ctx.stroke();
    u.ctx.restore();
  };

  const draw = (element) => {
    const chart = JSON.parse(element.querySelector("script").textContent);
    const plot = element.querySelector(".plot");
    const data = uPlot.join([[chart.x], ...chart.curves.map((curve) => [curve.x, curve.y])]);
    const all = chart.curves.flatMap((curve) => curve.y);
    const lowest = all.reduce((a, b) => Math.min(a, b));
    const highest = all.reduce((a, b) => Math.max(a, b));
    const range = (u, low, high) => {
      if (low == null || (low <= lowest && high >= highest)) return chart.y;
      if (chart.log) return [Math.max(low, chart.y[0]) / 1.2, high * 1.2];
      const air = 0.04 * (high - low) || Math.abs(low) / 2 || 1;
      return [low - air, high + air];
    };
    const step = (u, value) => {
      if (value == null) return "–";
      const epoch = chart.epoch ? ` (epoch ${plain(value / chart.epoch, 3)})` : "";
      return value.toLocaleString("en") + epoch;
    };
    const size = () => ({ width: plot.clientWidth, height: 230 });
    const options = {
      ...size(),
      scales: { x: { time: false }, y: { distr: chart.log ? 3 : 1, range } },
      series: [{ label: "step", value: step }, ...chart.curves.map((curve) => series(chart, curve))],
      axes: axes(chart),
      legend: {
        markers: {
          width: 0,
          fill: (u, index) => {
            const { colour, style } = chart.curves[index - 1] ?? {};
            return `color-mix(in srgb, var(--c${colour}) ${style === "faint" ? 40 : 100}%, transparent)`;
          },
        },
      },
      padding: [8, 26, 0, 0],
      cursor: { sync: { key: "steps" }, dataIdx: nearest, y: false },
      hooks: { drawClear: [resumed(chart)] },
    };
    const u = new uPlot(options, data, plot);
    addEventListener("resize", () => u.setSize(size()));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => u.redraw());
  };

  for (const element of document.querySelectorAll(".chart")) draw(element);

  // --- settings --------------------------------------------------------------------------------

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
