"""Pictures of a study, chosen from its axes and readable when printed in grey."""
