"""Pages that figures are drawn for.

page   their width and letters
fit    what is too long for a narrow one
edges  what lies at the ends of a panel
"""
