"""Operator cases: a file per op declares its inputs, our function and other libraries' functions."""
