"""Names of strangers, made harmless where they would be read as something else: formulas in a spreadsheet, commands to a terminal."""

import io
import re
from collections.abc import Mapping

import pandas as pd

#: What a cell begins with that a spreadsheet takes for a formula (OWASP, CSV Injection), after apostrophes that were there before.
_FORMULA = r"'*[=+\-@\t\r\n]"
#: Controls of C0 and C1, which terminals obey, line and paragraph separators, and marks that turn the direction of what follows.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def format_csv(table: pd.DataFrame, *, with_header: bool = True) -> str:
    """Format a table as CSV that a spreadsheet can open without running anything.

    >>> format_csv(pd.DataFrame({"path": ["=1+1.jpg", "a.jpg"], "pca_1": [-1.5, 2.0]})).splitlines()
    ['path,pca_1', "'=1+1.jpg,-1.5", 'a.jpg,2.0']
    """
    columns = {str(name): _quote_formulas(column) if _holds_text(column) else column for name, column in table.items()}
    # With another end of a line, Python before 3.13 leaves a carriage return within a text bare, which begins a new row for others.
    return pd.DataFrame(columns, table.index).to_csv(index=False, header=with_header, lineterminator="\r\n")


def read_csv(data: bytes, dtypes: Mapping[str, type]) -> pd.DataFrame:
    """Read what `format_csv` gave.

    >>> read_csv(format_csv(pd.DataFrame({"path": ["=1", "'=1", "'a"]})).encode(), {"path": str})["path"].tolist()
    ['=1', "'=1", "'a"]
    """
    table = pd.read_csv(io.BytesIO(data), keep_default_na=False, dtype=dict(dtypes))
    for name, kind in dtypes.items():
        if kind is str:
            table[name] = table[name].str.replace(rf"^'(?={_FORMULA})", "", regex=True)
    return table


def escape_controls(text: str, *, keeps_lines: bool = False) -> str:
    r"""Write characters that a terminal would obey as escapes.

    >>> print(escape_controls("red\x1b[31m\napple"))
    red\x1b[31m\napple
    """

    def escape(match: re.Match[str]) -> str:
        return match[0] if keeps_lines and match[0] == "\n" else match[0].encode("unicode_escape").decode("ascii")

    return _CONTROLS.sub(escape, text)


def _holds_text(column: pd.Series) -> bool:
    """Tell whether a column can hold text."""
    return not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column))


def _quote_formulas(column: pd.Series) -> pd.Series:
    """Put an apostrophe before texts that a spreadsheet would take for formulas."""
    is_formula = column.map(lambda value: isinstance(value, str)).astype(bool) & column.astype(str).str.match(_FORMULA)
    return column.astype(object).mask(is_formula, "'" + column.astype(str)) if is_formula.any() else column
