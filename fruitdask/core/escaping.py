"""Escape untrusted names: formulas for spreadsheets, control characters for terminals."""

import io
import re
from collections.abc import Mapping

import pandas as pd

#: The start of a cell that a spreadsheet reads as a formula (OWASP, CSV Injection), after existing apostrophes.
_FORMULA = r"'*[=+\-@\t\r\n]"
#: Control characters (C0 and C1), line and paragraph separators, and bidirectional controls.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def format_csv(table: pd.DataFrame, *, with_header: bool = True) -> str:
    """Format a table as CSV without formulas for spreadsheets.

    >>> format_csv(pd.DataFrame({"path": ["=1+1.jpg", "a.jpg"], "pca_1": [-1.5, 2.0]})).splitlines()
    ['path,pca_1', "'=1+1.jpg,-1.5", 'a.jpg,2.0']
    """
    columns = {str(name): _quote_formulas(column) for name, column in table.items()}
    # With other line ends, Python before 3.13 does not quote a carriage return, which others read as the end of a row.
    return pd.DataFrame(columns, table.index).to_csv(index=False, header=with_header, lineterminator="\r\n")


def read_csv(data: bytes, dtypes: Mapping[str, type]) -> pd.DataFrame:
    """Read the output of `format_csv`.

    >>> read_csv(format_csv(pd.DataFrame({"path": ["=1", "'=1", "'a"]})).encode(), {"path": str})["path"].tolist()
    ['=1', "'=1", "'a"]
    """
    table = pd.read_csv(io.BytesIO(data), keep_default_na=False, dtype=dict(dtypes))
    for name, kind in dtypes.items():
        if kind is str:
            table[name] = table[name].map(unquote_formula)
    return table


def unquote_formula(text: str) -> str:
    """Remove the apostrophe that `format_csv` puts before a text."""
    return re.sub(rf"^'(?={_FORMULA})", "", text)


def escape_controls(text: str, *, keeps_lines: bool = False) -> str:
    r"""Escape the control characters in a text.

    >>> print(escape_controls("red\x1b[31m\napple"))
    red\x1b[31m\napple
    """

    def escape(match: re.Match[str]) -> str:
        return match[0] if keeps_lines and match[0] == "\n" else match[0].encode("unicode_escape").decode("ascii")

    return _CONTROLS.sub(escape, text)


def _quote_formulas(column: pd.Series) -> pd.Series:
    """Put an apostrophe before texts that a spreadsheet would read as formulas."""
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return column
    is_formula = column.map(lambda value: isinstance(value, str)).astype(bool) & column.astype(str).str.match(_FORMULA)
    return column.astype(object).mask(is_formula, "'" + column.astype(str)) if is_formula.any() else column
