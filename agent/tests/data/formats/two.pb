
;
aPlaceholder*
dtype0*
shape:ÿÿÿÿÿÿÿÿÿ
;
bPlaceholder*
dtype0*
shape:ÿÿÿÿÿÿÿÿÿ

sumAddV2ab*
T0
!
productMula:0b:0*
T0"¿