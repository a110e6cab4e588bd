"""Everything in MedSteer that is true without a graph: values, estimators, operators, schedules and scores."""
