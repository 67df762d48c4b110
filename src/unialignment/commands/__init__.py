"""The commands of ``unialign``, one function pair each: ``configure`` declares arguments, ``run`` does the work.

Modules here import nothing heavy at their top, so that ``--help`` answers at once.
"""
