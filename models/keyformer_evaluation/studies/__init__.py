"""Tables and figures: many configurations measured, compared and drawn."""
