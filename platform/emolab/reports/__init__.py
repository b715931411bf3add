"""Pictures, tables and pages made from tracked runs."""
