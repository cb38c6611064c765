"""What a finished study says: effects, sensitivities, fronts, crossovers, and how well it fits measurements."""
