"""The cases of the operators: a file per op declares its inputs, ours and the functions of others."""
