use liquidgemm_eval::evaluate::*;
use liquidgemm_eval::model::Layers;
use liquidgemm_eval::*;
use std::sync::Arc;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let model = Model::open(a[1].as_ref()).unwrap();
    let limit: usize = a[2].parse().unwrap();
    let cal_limit: usize = a[3].parse().unwrap();
    let task = Task::new(&model, &texts::evaluation(&model.network), 512, Some(limit)).unwrap();
    println!("{} layers, {} tokens", model.layers.len(), task.tokens());
    println!("{:?}", &task.pieces()[0][..12]);
    let backend = Arc::new(liquidgemm::Backend::cpu());
    let recipes: Vec<Recipe> = a[4..]
        .iter()
        .map(|t| {
            let p: Vec<&str> = t.split('/').collect();
            Recipe {
                method: p[0].parse().unwrap(),
                group: p[1].parse().unwrap(),
                smooth: p.get(2).map(|x| x.parse().unwrap()),
            }
        })
        .collect();
    let t0 = std::time::Instant::now();
    let cal = if recipes.iter().any(|r| r.needs_calibration()) {
        let task = Task::new(&model, &texts::calibration(&model.network), 512, Some(cal_limit)).unwrap();
        println!("calibrating on {} tokens", task.tokens());
        Some(calibrate(&model, &task, recipes.iter().any(|r| r.needs_hessian()), &()).unwrap())
    } else {
        None
    };
    println!("{:?}", t0.elapsed());
    let t0 = std::time::Instant::now();
    let v: Vec<_> = recipes.iter().map(|r| r.layers(&model, cal.as_ref(), &backend, &()).unwrap()).collect();
    println!("quantize {:?}", t0.elapsed());
    let t0 = std::time::Instant::now();
    let d: Vec<&dyn Layers> = v.iter().map(|v| v as &dyn Layers).collect();
    for (r, s) in recipes.iter().zip(score(&model, &task, &d, &()).unwrap()) {
        println!("{r}: {s:?}");
    }
    println!("score {:?}", t0.elapsed());
}
