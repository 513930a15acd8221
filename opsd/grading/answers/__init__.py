"""Parse two answers and decide whether they mean the same.

    clean      normalise the spelling: Unicode, fonts, sizes, spaces
    numbers    plain numbers, exactly
    units      units of measurement, money, degrees, and other words after a number
    words      phrases, hedges, prose
    read       text -> a node: a value, a list, a tuple, a choice, ...
    bounds     refuse what would take too long to compute
    strict     forms that are equal to the reference but earn nothing, with the reasons
    compare    the rules by which two nodes are the same
    symbolic   compare values that need algebra, by math-verify

The grading process loads this package and neither torch nor transformers.
"""
