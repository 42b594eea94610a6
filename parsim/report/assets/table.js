// Tables: sorted by a click on a heading, filtered by words and by columns.

const COMPARE = {
  "=": (a, b) => a === b,
  "!=": (a, b) => a !== b,
  "<": (a, b) => a < b,
  "<=": (a, b) => a <= b,
  ">": (a, b) => a > b,
  ">=": (a, b) => a >= b,
};

// What a cell is sorted and compared by: a number where it is one.
function cellValue(cell) {
  const text = cell.dataset.v ?? cell.textContent.trim();
  const number = Number(text.replaceAll(",", ""));
  return text !== "" && Number.isFinite(number) ? number : text.toLowerCase();
}

// "tp=8 mfu>40 zb" as a list of tests of a row; what names no column is a word to look for.
function readFilter(text, keys) {
  return text.trim().toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const found = /^([a-z0-9_-]+)(<=|>=|!=|=|<|>)(.+)$/.exec(word);
    const column = found ? keys.indexOf(found[1]) : -1;
    if (column < 0) return (row) => row.textContent.toLowerCase().includes(word);
    const [, , how, wanted] = found;
    const number = Number(wanted.replaceAll(",", ""));
    return (row) => {
      const value = cellValue(row.cells[column]);
      if (typeof value === "number" && Number.isFinite(number)) return COMPARE[how](value, number);
      if (typeof value === "number" || value === "") return how === "!=";
      const contains = value.includes(wanted);
      return how === "=" ? contains : how === "!=" ? !contains : COMPARE[how](value, wanted);
    };
  });
}

// Numbers before words, and what is empty last, whichever way round.
function compareCells(a, b, up) {
  if (a === "" || b === "") return (a === "") - (b === "");
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return up ? order : -order;
}

function makeTable(root) {
  const body = root.querySelector("tbody");
  const heads = [...root.querySelectorAll("thead th")];
  const keys = heads.map((head) => head.dataset.key.toLowerCase());
  const rows = [...body.rows];

  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = new Map(rows.map((row, i) => [row, [cellValue(row.cells[column]), i]]));
      rows.sort((r, s) => {
        const [a, i] = order.get(r), [b, j] = order.get(s);
        return compareCells(a, b, up) || i - j;
      });
      body.append(...rows);
    });
  });

  const input = root.querySelector("input[type=search]");
  input?.addEventListener("input", () => {
    const tests = readFilter(input.value, keys);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !tests.every((test) => test(row));
      shown += !row.hidden;
    }
    root.querySelector("output").textContent =
      shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  });
}

for (const root of document.querySelectorAll("[data-table]")) makeTable(root);
