"""What an answer says, and whether two answers say the same: text in, verdict out.

    clean      one spelling for what only looks different: Unicode, fonts, sizes, spaces
    numbers    plain numbers, exactly
    units      units of measurement, money, degrees; what else may follow a number
    words      phrases, hedges, prose
    read       text -> a node: a value, a list, a tuple, a choice, ...
    bounds     what no process should be asked to compute
    strict     what is equal and yet earns nothing, with the reasons
    compare    the rules by which two nodes are the same
    symbolic   values that need algebra, by math-verify

The grading process loads this package and neither torch nor transformers.
"""
