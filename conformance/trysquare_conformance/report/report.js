// Filter and sort the budget tables. The page is whole without it.
(() => {
  const form = document.getElementById("filter");
  const groups = [...document.querySelectorAll("#budgets details")].map((details) => {
    const lane = details.dataset.lane.toLowerCase();
    const body = details.querySelector("tbody");
    const rows = [...body.rows].map((row) => ({
      row,
      text: lane + " " + [0, 1, 2].map((column) => row.cells[column].textContent.toLowerCase()).join(" "),
      status: row.className.replaceAll("-", " ") || "right",
    }));
    return { details, body, rows, opened: details.open };
  });
  const apply = () => {
    const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = form.status.value;
    const active = words.length > 0 || status !== "";
    let shown = 0;
    for (const group of groups) {
      let here = 0;
      for (const entry of group.rows) {
        const fits = (!status || entry.status === status) && words.every((word) => entry.text.includes(word));
        entry.row.hidden = !fits;
        here += fits;
      }
      group.details.hidden = here === 0;
      group.details.open = active ? here > 0 : group.opened;
      shown += here;
    }
    form.querySelector("output").textContent = active ? shown + (shown === 1 ? " case" : " cases") : "";
  };
  const value = (row, column) => {
    const text = row.cells[column].textContent.replace(/^\D (?=\S)/, "").replace("∞", "Infinity");
    const amount = parseFloat(text);
    return Number.isNaN(amount) ? text : amount;
  };
  const order = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? 1 : -1);
  const sort = (head, body) => {
    const column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort((a, b) => (down ? order(b[0], a[0]) : order(a[0], b[0])));
    body.append(...rows.map((pair) => pair[1]));
  };
  for (const { details, body } of groups)
    for (const head of details.querySelectorAll("th")) {
      head.tabIndex = 0;
      head.classList.add("sorts");
      head.addEventListener("click", () => sort(head, body));
      head.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          sort(head, body);
        }
      });
    }
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
})();
