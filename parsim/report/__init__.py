"""Reports: one self-contained HTML page that says what a command found, why, and how to repeat it.

A command's JSON document, and the timelines it drew its figures from, become a Page of nouns (page.py);
templates turn that into HTML. Scripts, styles and data are inside the file, and nothing is ever loaded.
"""
