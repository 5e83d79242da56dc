"""Every configuration, declared once: a page an algorithm, and beside it the faults that its cases must catch."""
