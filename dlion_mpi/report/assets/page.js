// Adds figures and their tables to the page, and redraws them when the run, the colours, the width or the medium changes.
(() => {
  const PAPER = 690, COLUMN = 335; // CSS pixels between the margins of A4 and of Letter; half of it, with a gap
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)"), print = matchMedia("print");
  const theme = document.getElementById("theme");
  const places = []; // { figure, box, chart } of every chart in the page
  let paper = false;

  function style() {
    const styles = getComputedStyle(root);
    const value = (name) => styles.getPropertyValue(`--${name}`).trim();
    const kind = !paper && (theme.value === "dark" || (!theme.value && dark.matches)) ? "dark" : "light";
    const found = { paper, colours: data.colours[kind] };
    for (const name of ["ground", "ink", "faint", "line", "low", "high"]) found[name] = value(name);
    return found;
  }

  function element(tag, parent, text, more = {}) {
    const made = Object.assign(document.createElement(tag), more);
    if (text) made.textContent = text;
    parent.appendChild(made);
    return made;
  }

  function add(figure, parent) {
    const holder = element("figure", parent, "", { id: `figure-${figure.key}` });
    if (figure.kind === "lines" && figure.panels.length > 1) holder.classList.add("wide");
    const caption = element("figcaption", holder);
    element("h3", caption, figure.title);
    const place = { figure, box: null, chart: null };
    if (figure.kind === "targets") choice(place, caption);
    element("p", caption, unit(figure), { className: "says" });
    if (charts.empty(figure)) {
      element("p", holder, "This run has no such data.", { className: "empty" });
      return;
    }
    place.box = element("div", holder, "", { className: "chart", role: "img" });
    place.box.setAttribute("aria-label", `${figure.title}. ${figure.says}`);
    numbers(figure, holder);
    places.push(place);
    draw(place, style());
  }

  function unit(figure) {
    const quantity = figure.kind === "matrix" ? `${figure.unit}.` : figure.kind === "lines" ? `${figure.y[0].toUpperCase()}${figure.y.slice(1)}.` : "";
    return `${quantity} ${figure.says}`.trim();
  }

  // A menu of targets.
  function choice(place, caption) {
    const label = element("label", caption, `${place.figure.metric} `);
    const select = element("select", label, "", { id: "target" });
    place.figure.targets.forEach((target, n) => element("option", select, `${place.figure.sign} ${target}${place.figure.unit}`, { value: n, selected: n === place.figure.chosen }));
    select.addEventListener("change", () => {
      place.figure.chosen = Number(select.value);
      draw(place, style());
    });
  }

  function numbers(figure, parent) {
    const details = element("details", parent);
    element("summary", details, "Data");
    details.addEventListener("toggle", () => {
      if (!details.open || details.children.length > 1) return;
      const [head, rows] = charts.table(figure);
      const button = element("button", details, "save as CSV", { type: "button" });
      button.addEventListener("click", () => save(`${figure.key}.csv`, [head, ...rows]));
      const table = element("table", element("div", details, "", { className: "scroll" }), "", { className: "numbers" });
      const titles = element("tr", element("thead", table));
      for (const name of head) element("th", titles, name, { scope: "col" });
      const body = element("tbody", table);
      for (const row of rows) {
        const line = element("tr", body);
        for (const value of row) element("td", line, value === null || value === undefined ? "–" : String(value));
      }
    });
  }

  function save(name, rows) {
    const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
    const text = rows.map((row) => row.map((value) => quoted(String(value ?? ""))).join(",")).join("\n");
    const link = element("a", document.body, "", { download: name, href: URL.createObjectURL(new Blob([text + "\n"], { type: "text/csv" })) });
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const wide = ({ box }) => {
    if (paper) return box.parentNode.className === "wide" ? PAPER : COLUMN;
    return Math.max(280, box.clientWidth);
  };

  function draw(place, colours) {
    const width = wide(place);
    const { option, height } = charts.option(place.figure, colours, width);
    place.box.style.height = `${height}px`;
    if (!place.chart) place.chart = echarts.init(place.box, null, { renderer: "svg", width, height });
    else place.chart.resize({ width, height });
    place.chart.setOption(option, { notMerge: true });
    place.width = width;
  }

  function redraw() {
    const colours = style();
    for (const key of document.querySelectorAll(".key[data-colour]")) {
      key.style.background = colours.colours[key.dataset.colour % colours.colours.length];
    }
    for (const place of places) draw(place, colours);
  }

  function show(index) {
    const single = document.getElementById("single");
    for (const place of places.filter((other) => single.contains(other.box))) {
      place.chart.dispose();
      places.splice(places.indexOf(place), 1);
    }
    single.replaceChildren();
    for (const figure of data.runs[index].figures) add(figure, single);
  }

  function choices() {
    const runs = document.getElementById("runs");
    data.runs.forEach((run, n) => {
      const label = element("label", runs);
      const input = element("input", label, "", { type: "radio", name: "run", value: n, checked: n === 0 });
      element("i", label, "", { className: "key" }).dataset.colour = n;
      label.append(run.label);
      input.addEventListener("change", () => show(n));
    });
    runs.hidden = data.runs.length < 2;
  }

  function onPaper(now) {
    if (paper === now) return;
    paper = now;
    root.dataset.theme = now ? "light" : theme.value;
    redraw();
  }

  for (const figure of data.comparison) add(figure, document.getElementById("comparison"));
  choices();
  show(0);
  redraw();
  theme.addEventListener("change", () => {
    root.dataset.theme = theme.value;
    redraw();
  });
  dark.addEventListener("change", redraw);
  // When printing, Firefox only sends the events, and Safari only changes the media query.
  print.addEventListener("change", () => onPaper(print.matches));
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));
  addEventListener("resize", () => {
    if (places.some((place) => place.width !== wide(place))) redraw();
  });
})();
