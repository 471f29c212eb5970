"use strict";
// Turns a figure (see figure.py) and a style (colours of the page) into the options of an ECharts chart.
const charts = (() => {
  const FONT = 'system-ui, "DejaVu Sans", sans-serif';

  const known = (values) => values.filter((value) => value !== null && value !== undefined);
  const shown = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumSignificantDigits: 4, useGrouping: false }));
  const colour = (style, index) => style.colours[index % style.colours.length];

  // Distance between ticks, so that there are about `count`: 1, 2 or 5 times a power of ten.
  function interval(length, count) {
    const least = (length || 1) / count;
    const power = 10 ** Math.floor(Math.log10(least));
    return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least * 0.999);
  }

  function timeAxis(name, end, width, style, more = {}) {
    const step = interval(end, Math.max(3, width / 90));
    return {
      type: "value", min: 0, max: end || 1, interval: step, name, nameLocation: "middle", nameGap: 26,
      axisLabel: { color: style.faint, showMaxLabel: Math.abs(end / step - Math.round(end / step)) < 1e-9, formatter: shown },
      axisLine: { lineStyle: { color: style.faint } }, splitLine: { show: false }, nameTextStyle: { color: style.faint },
      ...more,
    };
  }

  function valueAxis(name, style, more = {}) {
    return {
      type: "value", name, nameLocation: "end", nameGap: 10,
      nameTextStyle: { color: style.faint, align: "left", padding: [0, 0, 0, -40] },
      axisLabel: { color: style.faint, formatter: shown }, axisLine: { show: false }, axisTick: { show: false },
      splitLine: { lineStyle: { color: style.line } }, ...more,
    };
  }

  function base(style, height) {
    return {
      animation: false, textStyle: { fontFamily: FONT, color: style.ink }, backgroundColor: "transparent",
      tooltip: {
        backgroundColor: style.ground, borderColor: style.line, textStyle: { color: style.ink, fontSize: 12 },
        confine: true, transitionDuration: 0,
      },
      toolbox: {
        show: !style.paper, right: 0, bottom: 0, itemSize: 12, iconStyle: { borderColor: style.faint },
        feature: { saveAsImage: { type: "svg", title: "save as SVG", backgroundColor: style.ground } },
      },
    };
  }

  function legend(names, width, style) {
    const length = names.reduce((sum, name) => sum + 40 + 6.3 * name.length, 0);
    return {
      show: names.length > 1, height: names.length > 1 ? 24 * Math.ceil(length / (width - 40)) : 0,
      option: { data: names, left: 0, top: 0, right: 40, itemWidth: 22, itemHeight: 8, itemGap: 12, textStyle: { color: style.ink } },
    };
  }

  // A table of names and values. Texts come from files, so they are never set as HTML.
  function tip(title, rows) {
    const table = document.createElement("table");
    table.className = "tip";
    table.createCaption().textContent = title;
    for (const [mark, name, value] of rows) {
      const row = table.insertRow();
      const head = row.appendChild(document.createElement("th"));
      if (mark) head.appendChild(Object.assign(document.createElement("i"), { className: "key" })).style.background = mark;
      head.append(name);
      row.insertCell().textContent = value;
    }
    return table;
  }

  function range(figure) {
    const all = figure.panels.flatMap((panel) => panel.series.flatMap((line) => known([...line.y, ...(line.low || []), ...(line.high || [])])));
    const low = all.reduce((a, b) => Math.min(a, b), Infinity);
    const high = all.reduce((a, b) => Math.max(a, b), -Infinity);
    const positive = all.filter((value) => value > 0).reduce((a, b) => Math.min(a, b), Infinity);
    if (figure.log && positive < high / 20) {
      return { type: "log", min: 10 ** Math.floor(Math.log10(positive)), max: 10 ** Math.ceil(Math.log10(high) - 1e-9) };
    }
    const top = Math.min(Math.max(high, figure.top || 0), figure.cap || Infinity);
    const step = interval(top - Math.min(low, 0), 5);
    return { min: Math.min(0, Math.floor(low / step) * step), max: Math.ceil(top / step - 1e-9) * step || step, interval: step };
  }

  function lines(figure, style, width) {
    const panels = figure.panels;
    const across = panels.length === 1 ? 1 : width > 640 ? 3 : width > 480 ? 2 : 1;
    const alone = panels.length === 1;
    const names = [...new Set(panels.flatMap((panel) => panel.series.map((line) => line.name)))].sort((a, b) => (alone ? 0 : a.localeCompare(b, "en", { numeric: true })));
    const labelled = alone && names.length > 1 && names.length <= 8;
    const head = labelled ? { height: 0, show: false, option: {} } : legend(names, width, style);
    const right = labelled ? 26 + 6.6 * Math.min(18, Math.max(...names.map((name) => name.length))) : 14;
    const tall = alone ? (style.paper ? 170 : 230) : (style.paper ? 110 : 150);
    const step = { x: width / across, y: tall + (alone ? 0 : 62) };
    const end = Math.max(...panels.flatMap((panel) => panel.series.flatMap((line) => line.t || figure.t)), 0);
    const ys = range(figure);
    const option = { ...base(style), grid: [], xAxis: [], yAxis: [], series: [], title: [], legend: head.option };
    option.legend.show = head.show;
    panels.forEach((panel, n) => {
      const left = (n % across) * step.x, top = head.height + 34 + Math.floor(n / across) * step.y;
      option.grid.push({ left: left + 44, top, width: step.x - 44 - right - (alone ? 0 : 6), height: tall });
      if (panel.title) option.title.push({ text: panel.title, left: left + 40, top: top - 30, textStyle: { color: style.ink, fontSize: 12, fontWeight: 600 } });
      const lowest = n + across >= panels.length;
      option.xAxis.push(timeAxis(lowest ? figure.x : "", end, step.x - 60, style, { gridIndex: n }));
      option.yAxis.push(valueAxis(n ? "" : figure.y, style, { gridIndex: n, ...ys, ...(panel.title && !n ? { nameGap: 8 } : {}) }));
      const names = labelled ? { right: width - right, places: apart(panel.series, ys, top, tall) } : null;
      for (const line of panel.series) option.series.push(...drawn(figure, line, n, style, names));
    });
    if (!alone) option.yAxis[0].name = "";
    option.tooltip.trigger = "axis";
    option.tooltip.formatter = (points) => {
      const rows = points.filter((point) => point.seriesType === "line").map((point) => {
        const band = point.value[2] === undefined ? "" : ` (${shown(point.value[2])} to ${shown(point.value[3])})`;
        return [point.color, point.seriesName, shown(point.value[1]) + band];
      });
      return rows.length ? tip(`${shown(points[0].value[0])} s`, rows) : "";
    };
    option.dataZoom = [{ type: "inside", xAxisIndex: "all", filterMode: "none", zoomOnMouseWheel: "ctrl", moveOnMouseMove: false }];
    return { option, height: head.height + 34 + (Math.ceil(panels.length / across) - 1) * step.y + tall + 46 };
  }

  // Positions of the names to the right of the lines, in pixels from the top: at the last value, moved apart.
  function apart(all, ys, top, tall) {
    const ends = all.map((line) => [line.name, known(line.y).pop()]).filter((end) => end[1] !== undefined);
    const scale = (value) => (ys.type === "log" ? Math.log(Math.max(value, ys.min)) : value);
    const share = (value) => (scale(value) - scale(ys.min)) / (scale(ys.max) - scale(ys.min));
    const places = ends.map(([name, value]) => [name, top + tall * (1 - share(value))]).sort((a, b) => a[1] - b[1]);
    for (let k = 1; k < places.length; k++) places[k][1] = Math.max(places[k][1], places[k - 1][1] + 14);
    let lowest = top + tall + 6;
    for (const place of places.reverse()) {
      place[1] = Math.min(place[1], lowest);
      lowest = place[1] - 14;
    }
    return new Map(places);
  }

  function drawn(figure, line, panel, style, names) {
    const time = line.t || figure.t;
    const own = colour(style, line.colour);
    const axes = { xAxisIndex: panel, yAxisIndex: panel, name: line.name };
    const data = time.map((t, k) => (line.low ? [t, line.y[k], line.low[k], line.high[k]] : [t, line.y[k]]));
    const made = [{
      ...axes, type: "line", data, connectNulls: true, symbol: "circle", showSymbol: data.length <= 40, symbolSize: 4, z: 3,
      lineStyle: { width: 1.6, color: own, type: ["solid", "dashed", "dotted"][Math.floor(line.colour / style.colours.length) % 3] },
      itemStyle: { color: own }, emphasis: { focus: "series", lineStyle: { width: 2.4 } },
      endLabel: {
        show: names !== null, formatter: () => `{mark|●} ${line.name.length > 18 ? `${line.name.slice(0, 17)}…` : line.name}`,
        rich: { mark: { color: own, fontSize: 11 } }, color: style.ink, distance: 4, fontSize: 11, verticalAlign: "middle",
      },
      labelLayout: names ? () => ({ x: names.right + 8, y: names.places.get(line.name) }) : {},
    }];
    if (line.low) made.push(band(axes, time, line, own));
    return made;
  }

  // ECharts has no band: a polygon through the highs and back through the lows. Its two points of data are the
  // corners of what it covers, so that the axes leave room for it.
  function band(axes, time, line, own) {
    const rows = time.map((t, k) => [t, line.low[k], line.high[k]]).filter((row) => row[1] !== null && row[2] !== null);
    const lowest = Math.min(...known(line.low)), highest = Math.max(...known(line.high));
    return {
      ...axes, type: "custom", silent: true, clip: true, z: 2, itemStyle: { color: own },
      data: rows.length ? [[rows[0][0], lowest], [rows[rows.length - 1][0], highest]] : [],
      renderItem: (params, api) => params.dataIndexInside ? null : {
        type: "polygon", style: { fill: own, opacity: 0.16 },
        shape: { points: [...rows.map((row) => api.coord([row[0], row[2]])), ...rows.map((row) => api.coord([row[0], row[1]])).reverse()] },
      },
    };
  }

  function rowAxis(rows, style, width) {
    return {
      type: "category", data: rows, inverse: true, axisTick: { show: false }, axisLine: { show: false },
      axisLabel: { color: style.ink, width: nameWidth(rows, width) - 10, overflow: "truncate" },
    };
  }

  const barAxis = (name, style, width) => valueAxis(name, style, {
    nameLocation: "middle", nameGap: 26, nameTextStyle: { color: style.faint }, splitNumber: Math.max(1, Math.round(width / 70)),
  });

  const nameWidth = (rows, width) => Math.min(0.35 * width, 20 + 7 * Math.max(...rows.map((name) => name.length), 0));

  function bars(figure, style, width) {
    const parts = figure.parts.filter((part) => part.values.some((value) => value > 0));
    const head = legend(parts.map((part) => part.name), width, style);
    const tall = figure.rows.length > 12 ? 16 : 30;
    const totals = figure.rows.map((_, k) => parts.reduce((sum, part) => sum + (part.values[k] || 0), 0));
    const option = { ...base(style), legend: { ...head.option, show: head.show } };
    option.grid = { left: nameWidth(figure.rows, width), right: 60, top: head.height + 8, height: tall * figure.rows.length };
    option.yAxis = rowAxis(figure.rows, style, width);
    option.xAxis = barAxis(figure.x, style, width - option.grid.left - option.grid.right);
    option.series = parts.map((part) => ({
      name: part.name, type: "bar", stack: "all", data: part.values, barWidth: "62%",
      itemStyle: { color: colour(style, part.colour), borderColor: style.ground, borderWidth: 1 },
    }));
    option.series.push({
      name: "total", type: "bar", stack: "all", data: totals.map(() => 0), silent: true, tooltip: { show: false },
      label: { show: true, position: "right", color: style.ink, formatter: (point) => shown(totals[point.dataIndex]) },
    });
    option.tooltip.trigger = "axis";
    option.tooltip.axisPointer = { type: "shadow" };
    option.tooltip.formatter = (points) => tip(points[0].name, [
      ...points.filter((point) => point.seriesName !== "total").map((point) => [point.color, point.seriesName, `${shown(point.value)} s`]),
      ["", "all", `${shown(totals[points[0].dataIndex])} s`],
    ]);
    return { option, height: head.height + 8 + tall * figure.rows.length + 50 };
  }

  function targets(figure, style, width) {
    const times = figure.reached.map((row) => row[figure.chosen]);
    const fastest = Math.min(...known(times));
    const option = base(style);
    option.grid = { left: nameWidth(figure.rows, width), right: 110, top: 8, height: 34 * figure.rows.length };
    option.yAxis = rowAxis(figure.rows, style, width);
    option.xAxis = barAxis(figure.x, style, width - option.grid.left - option.grid.right);
    option.tooltip.show = false;
    option.series = [{
      type: "bar", barWidth: "58%",
      data: times.map((time, k) => ({
        value: time === null ? figure.seconds[k] : time,
        itemStyle: time === null
          ? { color: "transparent", borderColor: colour(style, k), decal: { color: colour(style, k), symbol: "rect", dashArrayX: [1, 0], dashArrayY: [1, 5], rotation: -Math.PI / 4 } }
          : { color: colour(style, k) },
      })),
      label: {
        show: true, position: "right", color: style.ink, fontSize: 12,
        formatter: (point) => {
          const time = times[point.dataIndex];
          if (time === null) return "not reached";
          return `${shown(time)} s` + (known(times).length > 1 ? `  ${(time / fastest).toFixed(2)} ×` : "");
        },
      },
    }];
    return { option, height: 8 + 34 * figure.rows.length + 50 };
  }

  function matrix(figure, style, width) {
    const cells = figure.values.flatMap((row, r) => row.map((value, c) => [c, r, value])).filter((cell) => cell[2] !== null);
    const highest = Math.max(...cells.map((cell) => cell[2]), 0);
    const side = Math.max(14, Math.min(64, (Math.min(width, 620) - 110) / figure.columns.length));
    const option = base(style);
    const short = (name) => name.replace(/^worker /, "");
    const axis = { type: "category", axisTick: { show: false }, axisLine: { show: false }, splitArea: { show: false }, nameTextStyle: { color: style.faint }, nameLocation: "middle" };
    option.grid = { left: 56, top: 44, width: side * figure.columns.length, height: Math.min(side, 40) * figure.rows.length };
    option.xAxis = { ...axis, position: "top", data: figure.columns.map(short), name: `${figure.x} worker`, nameGap: 24, axisLabel: { color: style.ink } };
    option.yAxis = { ...axis, inverse: true, data: figure.rows.map(short), name: `${figure.y} worker`, nameGap: 30, axisLabel: { color: style.ink } };
    option.visualMap = { show: false, min: 0, max: highest || 1, inRange: { color: [style.low, style.high] } };
    option.series = [{
      type: "heatmap", itemStyle: { borderColor: style.ground, borderWidth: 1 },
      data: cells.map((cell) => ({ value: cell, label: { color: cell[2] > 0.5 * highest ? style.ground : style.ink } })),
      label: { show: side >= 34, formatter: (point) => shown(Number(point.value[2].toPrecision(3))), fontSize: 11 },
    }];
    option.tooltip.formatter = (point) => tip(`from ${figure.rows[point.value[1]]} to ${figure.columns[point.value[0]]}`, [["", figure.unit, shown(point.value[2])]]);
    return { option, height: 44 + Math.min(side, 40) * figure.rows.length + 10 };
  }

  function spans(figure, style, width) {
    const sources = [...new Set(figure.items.map((item) => item[3]))].sort((a, b) => a - b);
    const name = (source) => `weights of worker ${source}`;
    const head = legend(sources.map(name), width, style);
    const tall = figure.rows.length > 12 ? 16 : 26;
    const option = { ...base(style), legend: { ...head.option, show: head.show } };
    option.grid = { left: nameWidth(figure.rows, width), right: 20, top: head.height + 8, height: tall * figure.rows.length };
    option.yAxis = { ...rowAxis(figure.rows, style, width), splitLine: { show: true, lineStyle: { color: style.line } } };
    option.xAxis = timeAxis(figure.x, figure.end, width - 100, style);
    option.series = sources.map((source) => ({
      name: name(source), type: "custom", itemStyle: { color: colour(style, source) }, encode: { x: [1, 2], y: 0 }, clip: true,
      data: figure.items.filter((item) => item[3] === source),
      renderItem: (params, api) => {
        const from = api.coord([api.value(1), api.value(0)]), to = api.coord([api.value(2), api.value(0)]);
        const length = Math.max(4, to[0] - from[0]), height = 0.6 * tall, own = colour(style, source);
        const shape = { x: from[0], y: from[1] - height / 2, width: length, height };
        const children = [{ type: "rect", shape, style: { fill: api.value(4) ? own : style.ground, stroke: own, lineWidth: 1.5 } }];
        if (tall > 16) children.push({ type: "text", style: { text: String(source), x: from[0] + length + 3, y: from[1], verticalAlign: "middle", fill: style.ink, font: `10px ${FONT}` } });
        return { type: "group", children };
      },
    }));
    option.tooltip.formatter = (point) => {
      const [row, requested, done, source, merged, size] = point.value;
      return tip(figure.rows[row], [
        ["", "weights of", `worker ${source}`], ["", "merged", merged ? "yes" : "no"], ["", "requested", `${shown(requested)} s`],
        ["", "done", `${shown(done)} s`], ["", "received", `${shown(size)} MB`],
      ]);
    };
    return { option, height: head.height + 8 + tall * figure.rows.length + 50 };
  }

  // The data of a figure as a table: headings and rows.
  const tables = {
    lines(figure) {
      const all = figure.panels.flatMap((panel) => panel.series.map((line) => ({ ...line, name: [panel.title, line.name].filter(Boolean).join(" ") })));
      if (figure.t) {
        const bands = (line) => (line.low ? [line.low, line.high] : []);
        const head = [figure.x, ...all.flatMap((line) => [`${line.name}, ${figure.y}`, ...(line.low ? ["low", "high"] : [])])];
        return [head, figure.t.map((t, k) => [t, ...all.flatMap((line) => [line.y, ...bands(line)].map((values) => values[k]))])];
      }
      const banded = all.some((line) => line.low);
      const head = ["", figure.x, figure.y, ...(banded ? ["lowest", "highest"] : [])];
      return [head, all.flatMap((line) => line.t.map((t, k) => [line.name, t, line.y[k], ...(banded ? [line.low[k], line.high[k]] : [])]))];
    },
    bars(figure) {
      const unit = figure.x.replace(/.*\(/, "(");
      return [["", ...figure.parts.map((part) => `${part.name} ${unit}`)], figure.rows.map((row, k) => [row, ...figure.parts.map((part) => part.values[k])])];
    },
    targets(figure) {
      return [[`${figure.metric} ${figure.sign}${figure.unit && " (%)"}`, ...figure.rows.map((row) => `${row} (s)`)], figure.targets.map((target, k) => [target, ...figure.reached.map((row) => row[k])])];
    },
    matrix(figure) {
      return [[`${figure.y} \\ ${figure.x}`, ...figure.columns.map((name) => `${name} (${figure.unit})`)], figure.rows.map((row, k) => [row, ...figure.values[k]])];
    },
    spans(figure) {
      const head = ["", "requested (s)", "done (s)", "weights of", "merged", "received (MB)"];
      return [head, figure.items.map((item) => [figure.rows[item[0]], item[1], item[2], `worker ${item[3]}`, item[4] ? "yes" : "no", item[5]])];
    },
  };

  function empty(figure) {
    const values = {
      lines: () => figure.panels.flatMap((panel) => panel.series.flatMap((line) => line.y)),
      bars: () => figure.parts.flatMap((part) => part.values),
      targets: () => figure.rows,
      matrix: () => figure.values.flat(),
      spans: () => figure.items,
    };
    return known(values[figure.kind]()).length === 0;
  }

  const options = { lines, bars, targets, matrix, spans };
  return {
    empty,
    option: (figure, style, width) => options[figure.kind](figure, style, width),
    table: (figure) => tables[figure.kind](figure),
  };
})();
