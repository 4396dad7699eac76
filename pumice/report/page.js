// Tables sort by a click on a heading. Without this script they are in the order of execution.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const [left, right] = [a, b].map((row) => row.cells[column].dataset.value ?? row.cells[column].textContent);
        if (left === "" || right === "") return (left === "") - (right === ""); // what was not measured comes last
        const order = isNaN(left) || isNaN(right) ? left.localeCompare(right) : left - right;
        return ascending ? order : -order;
      });
      body.append(...rows);
    });
  });
}
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
