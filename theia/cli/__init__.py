from theia.late import torchmetrics_in_part

# Most commands import Lightning, and Lightning torchmetrics.
torchmetrics_in_part()
