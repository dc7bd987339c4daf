"""The MIMIC-IV items and ICD codes the synthetic cohort uses, spelled as the real tables spell them.

Facts from the published MIMIC-IV demo 2.2 (d_items, d_labitems, d_icd_diagnoses; PhysioNet).
"""

# itemid|label|abbreviation|linksto|category|unitname|param_type|lownormalvalue|highnormalvalue
# The real table has the text "None" for some items without a unit, and an empty unitname for others.
_ITEMS = """\
220045|Heart Rate|HR|chartevents|Routine Vital Signs|bpm|Numeric||
220050|Arterial Blood Pressure systolic|ABPs|chartevents|Routine Vital Signs|mmHg|Numeric|90|140
220051|Arterial Blood Pressure diastolic|ABPd|chartevents|Routine Vital Signs|mmHg|Numeric|60|90
220052|Arterial Blood Pressure mean|ABPm|chartevents|Routine Vital Signs|mmHg|Numeric||
220179|Non Invasive Blood Pressure systolic|NBPs|chartevents|Routine Vital Signs|mmHg|Numeric||
220180|Non Invasive Blood Pressure diastolic|NBPd|chartevents|Routine Vital Signs|mmHg|Numeric||
220181|Non Invasive Blood Pressure mean|NBPm|chartevents|Routine Vital Signs|mmHg|Numeric||
225309|ART BP Systolic|ART BP Systolic|chartevents|Routine Vital Signs|mmHg|Numeric||
225310|ART BP Diastolic|ART BP Diastolic|chartevents|Routine Vital Signs|mmHg|Numeric||
225312|ART BP Mean|ART BP Mean|chartevents|Routine Vital Signs|mmHg|Numeric||
224167|Manual Blood Pressure Systolic Left|Manual BPs L|chartevents|Routine Vital Signs|mmHg|Numeric||
224643|Manual Blood Pressure Diastolic Left|Manual BPd L|chartevents|Routine Vital Signs|mmHg|Numeric||
227243|Manual Blood Pressure Systolic Right|Manual BPs R|chartevents|Routine Vital Signs|mmHg|Numeric||
224322|IABP Mean|MAP - Assisted|chartevents|IABP|mmHg|Numeric||
220210|Respiratory Rate|RR|chartevents|Respiratory|insp/min|Numeric||
224690|Respiratory Rate (Total)|Respiratory Rate (Total)|chartevents|Respiratory|insp/min|Numeric||36
224689|Respiratory Rate (spontaneous)|Respiratory Rate (spontaneous)|chartevents|Respiratory|insp/min|Numeric||
224422|Spont RR|Spont RR|chartevents|Respiratory|bpm|Numeric||
220277|O2 saturation pulseoxymetry|SpO2|chartevents|Respiratory|%|Numeric||
220227|Arterial O2 Saturation|SaO2|chartevents|Labs|%|Numeric||
223835|Inspired O2 Fraction|FiO2|chartevents|Respiratory|None|Numeric||
223761|Temperature Fahrenheit|Temperature F|chartevents|Routine Vital Signs|°F|Numeric||
223762|Temperature Celsius|Temperature C|chartevents|Routine Vital Signs|°C|Numeric||
220739|GCS - Eye Opening|Eye Opening|chartevents|Neurological||Text||
223900|GCS - Verbal Response|Verbal Response|chartevents|Neurological||Text||
223901|GCS - Motor Response|Motor Response|chartevents|Neurological||Text||
223951|Capillary Refill R|Capillary Refill R|chartevents|Cardiovascular (Pulses)||Text||
224308|Capillary Refill L|Capillary Refill L|chartevents|Cardiovascular (Pulses)||Text||
220621|Glucose (serum)|Glucose (serum)|chartevents|Labs|None|Numeric||
225664|Glucose finger stick (range 70-100)|Glucose FS (range 70 -100)|chartevents|Labs|None|Numeric||
226537|Glucose (whole blood)|Glucose (whole blood)|chartevents|Labs|None|Numeric||
223830|PH (Arterial)|PH (Arterial)|chartevents|Labs|None|Numeric||
220274|PH (Venous)|PH (Venous)|chartevents|Labs|None|Numeric||
226707|Height|Height|chartevents|General|Inch|Numeric||
226730|Height (cm)|Height (cm)|chartevents|General|cm|Numeric||
226512|Admission Weight (Kg)|Admission Weight (Kg)|chartevents|General|kg|Numeric||
226531|Admission Weight (lbs.)|Admission Weight (lbs.)|chartevents|General|None|Numeric||
224639|Daily Weight|Daily Weight|chartevents|General|kg|Numeric||
220048|Heart Rhythm|Heart Rhythm|chartevents|Routine Vital Signs||Text||
226559|Foley|Foley|outputevents|Output|mL|Numeric||
"""

# itemid|label|fluid|category
_LAB_ITEMS = """\
50931|Glucose|Blood|Chemistry
50809|Glucose|Blood|Blood Gas
51478|Glucose|Urine|Hematology
50817|Oxygen Saturation|Blood|Blood Gas
50820|pH|Blood|Blood Gas
51491|pH|Urine|Hematology
50831|pH|Other Body Fluid|Blood Gas
51094|pH|Urine|Chemistry
50912|Creatinine|Blood|Chemistry
51222|Hemoglobin|Blood|Hematology
50813|Lactate|Blood|Blood Gas
"""

# CCS category, ICD version, code, title; CCS category 0: none of the 25 phenotypes. Only codes with an undisputed CCS
# category: the phenotype table of the released MedFuse, ICD-9 CCS (after the CMS GEMs for ICD-10) and HCUP's CCS for
# ICD-10 agree. Many common codes are disputed: the released table lacks J96.01 and I25.10, and J44.0 is COPD or
# bronchitis.
_CODES = """\
157 9 5849 Acute kidney failure, unspecified
157 9 5845 Acute kidney failure with lesion of tubular necrosis
157 10 N179 Acute kidney failure, unspecified
157 10 N170 Acute kidney failure with tubular necrosis
109 9 431 Intracerebral hemorrhage
109 9 43491 Cerebral artery occlusion, unspecified with cerebral infarction
109 10 I619 Nontraumatic intracerebral hemorrhage, unspecified
109 10 I6340 Cerebral infarction due to embolism of unspecified cerebral artery
100 9 41071 Subendocardial infarction, initial episode of care
100 9 41011 Acute myocardial infarction of other anterior wall, initial episode of care
100 10 I214 Non-ST elevation (NSTEMI) myocardial infarction
100 10 I2119 ST elevation (STEMI) myocardial infarction involving other coronary artery of inferior wall
106 9 42731 Atrial fibrillation
106 9 4271 Paroxysmal ventricular tachycardia
106 10 I4891 Unspecified atrial fibrillation
106 10 I4892 Unspecified atrial flutter
158 9 5859 Chronic kidney disease, unspecified
158 9 5853 Chronic kidney disease, Stage III (moderate)
158 10 N189 Chronic kidney disease, unspecified
158 10 N184 Chronic kidney disease, stage 4 (severe)
127 9 496 Chronic airway obstruction, not elsewhere classified
127 9 4928 Other emphysema
127 10 J449 Chronic obstructive pulmonary disease, unspecified
127 10 J439 Emphysema, unspecified
238 9 99859 Other postoperative infection
238 9 9971 Cardiac complications, not elsewhere classified
238 10 T8131XA Disruption of external operation (surgical) wound, not elsewhere classified, initial encounter
238 10 I9581 Postprocedural hypotension
105 9 4263 Other left bundle branch block
105 9 42612 Mobitz (type) II atrioventricular block
105 10 I447 Left bundle-branch block, unspecified
105 10 I4581 Long QT syndrome
108 9 4280 Congestive heart failure, unspecified
108 9 42833 Acute on chronic diastolic heart failure
108 10 I5032 Chronic diastolic (congestive) heart failure
108 10 I5023 Acute on chronic systolic (congestive) heart failure
101 9 41401 Coronary atherosclerosis of native coronary artery
101 9 412 Old myocardial infarction
101 10 I252 Old myocardial infarction
101 10 Z951 Presence of aortocoronary bypass graft
50 9 25060 Diabetes with neurological manifestations, type II or unspecified type, not stated as uncontrolled
50 9 25040 Diabetes with renal manifestations, type II or unspecified type, not stated as uncontrolled
50 10 E1010 Type 1 diabetes mellitus with ketoacidosis without coma
50 10 E1029 Type 1 diabetes mellitus with other diabetic kidney complication
49 9 25000 Diabetes mellitus without mention of complication, type II or unspecified type, not stated as uncontrolled
49 9 24900 Secondary diabetes mellitus without mention of complication, not stated as uncontrolled, or unspecified
49 10 E119 Type 2 diabetes mellitus without complications
49 10 E109 Type 1 diabetes mellitus without complications
53 9 2724 Other and unspecified hyperlipidemia
53 9 2720 Pure hypercholesterolemia
53 10 E785 Hyperlipidemia, unspecified
53 10 E781 Pure hyperglyceridemia
98 9 4019 Unspecified essential hypertension
98 10 I10 Essential (primary) hypertension
55 9 2761 Hyposmolality and/or hyponatremia
55 9 2767 Hyperpotassemia
55 10 E871 Hypo-osmolality and hyponatremia
55 10 E875 Hyperkalemia
153 9 5789 Hemorrhage of gastrointestinal tract, unspecified
153 9 5781 Blood in stool
153 10 K921 Melena
153 10 K922 Gastrointestinal hemorrhage, unspecified
99 9 40390 Hypertensive chronic kidney disease, unspecified, with chronic kidney disease stage I \
through stage IV, or unspecified
99 9 40391 Hypertensive chronic kidney disease, unspecified, with chronic kidney disease stage V or \
end stage renal disease
99 10 I129 Hypertensive chronic kidney disease with stage 1 through stage 4 chronic kidney disease, \
or unspecified chronic kidney disease
99 10 I120 Hypertensive chronic kidney disease with stage 5 chronic kidney disease or end stage renal disease
151 9 5715 Cirrhosis of liver without mention of alcohol
151 9 5723 Portal hypertension
151 10 K766 Portal hypertension
151 10 K7290 Hepatic failure, unspecified without coma
133 9 515 Postinflammatory pulmonary fibrosis
133 9 5184 Acute edema of lung, unspecified
133 10 J810 Acute pulmonary edema
133 10 R918 Other nonspecific abnormal finding of lung field
134 9 7847 Epistaxis
134 9 4779 Allergic rhinitis, cause unspecified
134 10 R040 Epistaxis
134 10 J309 Allergic rhinitis, unspecified
130 9 5119 Unspecified pleural effusion
130 9 5180 Pulmonary collapse
130 10 J942 Hemothorax
130 10 J918 Pleural effusion in other conditions classified elsewhere
122 9 486 Pneumonia, organism unspecified
122 9 48241 Methicillin susceptible pneumonia due to Staphylococcus aureus
122 10 J189 Pneumonia, unspecified organism
122 10 J159 Unspecified bacterial pneumonia
131 9 51881 Acute respiratory failure
131 9 51851 Acute respiratory failure following trauma and surgery
131 10 J9600 Acute respiratory failure, unspecified whether with hypoxia or hypercapnia
131 10 J9690 Respiratory failure, unspecified, unspecified whether with hypoxia or hypercapnia
2 9 0389 Unspecified septicemia
2 9 99592 Severe sepsis
2 10 A4151 Sepsis due to Escherichia coli [E. coli]
2 10 R6520 Severe sepsis without septic shock
249 9 78551 Cardiogenic shock
249 9 78552 Septic shock
249 10 R570 Cardiogenic shock
249 10 R578 Other shock
0 9 2859 Anemia, unspecified
0 9 53081 Esophageal reflux
0 9 311 Depressive disorder, not elsewhere classified
0 9 2449 Unspecified acquired hypothyroidism
0 9 5990 Urinary tract infection, site not specified
0 9 3051 Tobacco use disorder
0 9 V1582 Personal history of tobacco use
0 9 2875 Thrombocytopenia, unspecified
0 10 D649 Anemia, unspecified
0 10 K219 Gastro-esophageal reflux disease without esophagitis
0 10 F329 Major depressive disorder, single episode, unspecified
0 10 E039 Hypothyroidism, unspecified
0 10 N390 Urinary tract infection, site not specified
0 10 Z87891 Personal history of nicotine dependence
0 10 D696 Thrombocytopenia, unspecified
0 10 G4733 Obstructive sleep apnea (adult) (pediatric)
"""

_ITEM_COLUMNS = "itemid label abbreviation linksto category unitname param_type lownormalvalue highnormalvalue"
ITEM_COLUMNS = tuple(_ITEM_COLUMNS.split())
LAB_ITEM_COLUMNS = ("itemid", "label", "fluid", "category")
ITEMS = [tuple(line.split("|")) for line in _ITEMS.splitlines()]
LAB_ITEMS = [tuple(line.split("|")) for line in _LAB_ITEMS.splitlines()]


def _codes() -> dict[tuple[int, int], list[tuple[str, str]]]:
    codes = {}
    for line in _CODES.splitlines():
        ccs, version, code, title = line.split(maxsplit=3)
        codes.setdefault((int(ccs), int(version)), []).append((code, title))
    return codes


CODES = _codes()  # (CCS category or 0, ICD version) -> [(code, title), ...]
