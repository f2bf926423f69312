// Draws the charts, anew when the reader's device changes between light and dark, and sorts tables.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Charts follow the width of the page by themselves, but not the number of columns of their legends.
  const columns = (element) => Math.max(1, Math.floor((element.clientWidth - 50) / 125));

  const drawOne = async ([name, spec]) => {
    const element = document.getElementById(name);
    const theme = dark.matches ? page.dark : page.light;
    element.dataset.columns = columns(element);
    element.vega?.finalize();
    element.vega = await vegaEmbed(element, spec, {
      actions: false,
      renderer: "svg",
      config: { ...theme, legend: { ...theme.legend, columns: columns(element) } },
      tooltip: { theme: dark.matches ? "dark" : "light" },
    });
  };
  const charts = Object.entries(page.specs);
  const draw = () => Promise.all(charts.map(drawOne));

  let waiting;
  const resized = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const changed = ([name]) => {
        const element = document.getElementById(name);
        return Number(element.dataset.columns) !== columns(element);
      };
      charts.filter(changed).forEach(drawOne);
    }, 150);
  };

  const sort = (button) => {
    const heading = button.closest("th");
    const descending = heading.getAttribute("aria-sort") === "ascending";
    heading.parentElement.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = (row) => {
      const cell = row.cells[heading.cellIndex];
      return cell.dataset.value ?? cell.textContent.trim();
    };
    const order = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === ""); // empty cells last, either way
      const numbers = [Number(a), Number(b)];
      const compared = numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
      return descending ? -compared : compared;
    };
    const body = heading.closest("table").tBodies[0];
    body.append(...Array.from(body.rows).sort((a, b) => order(key(a), key(b))));
  };

  document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => sort(button)));
  dark.addEventListener("change", draw);
  addEventListener("resize", resized);
  draw().then(() => (document.documentElement.dataset.drawn = "yes"));
})();
