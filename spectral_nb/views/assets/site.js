// What scrolls sideways can be reached by the keyboard: code, formulas, tables.
const reachable = () => {
  for (const e of document.querySelectorAll("pre > code, .formula, .dataframe, .md-typeset__scrollwrap")) {
    if (e.scrollWidth > e.clientWidth) e.tabIndex = 0;
  }
};
for (const event of ["load", "resize", "toggle"]) addEventListener(event, reachable, true);
