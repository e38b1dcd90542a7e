//! The `#[kernel]` attribute of `cuda_std`.
//!
//! rustc's NVPTX backend supports kernels (`extern "ptx-kernel"`), but it lacks attributes
//! for launch bounds, cluster dimensions and the 64-byte alignment of a tensor map as a parameter.
//! The macro writes these into the PTX as comment lines, and `cuda_builder` turns the lines into directives.
//! They are:
//!
//! ```text
//! //@ launch_bounds NAME MAX_THREADS MIN_BLOCKS
//! //@ cluster NAME BLOCKS
//! //@ align_parameter NAME INDEX 64
//! ```

use proc_macro::TokenStream;
use proc_macro2::TokenStream as TokenStream2;
use quote::quote;
use syn::{
    FnArg, Ident, ItemFn, LitInt, Pat, Token, Type, TypeArray, parse::Parse, parse::ParseStream,
    parse_macro_input,
};

/// The `key = integer` pairs between the parentheses of the attribute.
struct Bounds {
    max_threads: Option<LitInt>,
    min_blocks: Option<LitInt>,
    cluster: Option<LitInt>,
}

impl Parse for Bounds {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        let mut bounds = Bounds { max_threads: None, min_blocks: None, cluster: None };
        while !input.is_empty() {
            let key: Ident = input.parse()?;
            input.parse::<Token![=]>()?;
            let value: LitInt = input.parse()?;
            match key.to_string().as_str() {
                "max_threads" => bounds.max_threads = Some(value),
                "min_blocks" => bounds.min_blocks = Some(value),
                "cluster" => bounds.cluster = Some(value),
                _ => return Err(syn::Error::new(key.span(), "expected max_threads, min_blocks or cluster")),
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        if bounds.min_blocks.is_some() && bounds.max_threads.is_none() {
            return Err(input.error("min_blocks needs max_threads"));
        }
        Ok(bounds)
    }
}

/// Makes an `unsafe fn` a kernel that the host launches by the function's name.
///
/// `#[kernel(max_threads = 384, min_blocks = 1, cluster = 2)]` sets launch bounds
/// and the cluster size along x.
/// Each of them is optional, but `min_blocks` needs `max_threads`.
///
/// A parameter marked `#[grid_constant]` must be a `TensorMap` or an array of them.
/// The caller passes it by value. The body sees a `*const TensorMap` into the parameter bank,
/// which points to the first one of an array.
#[proc_macro_attribute]
pub fn kernel(attribute: TokenStream, item: TokenStream) -> TokenStream {
    let bounds = parse_macro_input!(attribute as Bounds);
    let function = parse_macro_input!(item as ItemFn);
    expand(bounds, function).unwrap_or_else(syn::Error::into_compile_error).into()
}

fn expand(bounds: Bounds, mut function: ItemFn) -> syn::Result<TokenStream2> {
    let name = function.sig.ident.to_string();
    if function.sig.unsafety.is_none() {
        return Err(syn::Error::new(function.sig.ident.span(), "a kernel must be an unsafe fn"));
    }

    let mut notes = Vec::new();
    if let Some(threads) = &bounds.max_threads {
        let blocks = bounds.min_blocks.as_ref().map_or("0", LitInt::base10_digits);
        notes.push(format!("//@ launch_bounds {name} {threads} {blocks}"));
    }
    if let Some(blocks) = &bounds.cluster {
        notes.push(format!("//@ cluster {name} {blocks}"));
    }

    let mut addresses = Vec::new();
    for (index, input) in function.sig.inputs.iter_mut().enumerate() {
        let FnArg::Typed(parameter) = input else { continue };
        let before = parameter.attrs.len();
        parameter.attrs.retain(|attribute| !attribute.path().is_ident("grid_constant"));
        if parameter.attrs.len() == before {
            continue;
        }
        let Pat::Ident(pattern) = &*parameter.pat else {
            return Err(syn::Error::new_spanned(&parameter.pat, "a grid constant needs a plain name"));
        };
        let variable = pattern.ident.clone();
        notes.push(format!("//@ align_parameter {name} {index} 64"));
        let symbol = format!("mov.b64 {{0}}, {name}_param_{index};");
        addresses.push(quote! {
            let #variable: *const ::cuda_std::TensorMap;
            // SAFETY: takes the address of this kernel's own parameter.
            unsafe {
                ::core::arch::asm!(
                    #symbol,
                    "cvta.param.u64 {0}, {0};",
                    out(reg64) #variable,
                    options(pure, nomem, nostack)
                );
            }
        });
        // rustc cannot yet pass an over-aligned aggregate by value. `cuda_builder` restores the alignment.
        let declared = match &*parameter.ty {
            Type::Array(TypeArray { len, .. }) => syn::parse_quote!([u64; 16 * #len]),
            _ => syn::parse_quote!([u64; 16]),
        };
        *parameter.ty = declared;
        *parameter.pat = syn::parse_quote!(_);
    }

    let attributes = &function.attrs;
    let visibility = &function.vis;
    let identifier = &function.sig.ident;
    let inputs = &function.sig.inputs;
    let statements = &function.block.stmts;
    Ok(quote! {
        #( ::core::arch::global_asm!(#notes); )*
        #( #attributes )*
        #[unsafe(no_mangle)]
        #[allow(improper_ctypes_definitions)]
        #visibility unsafe extern "ptx-kernel" fn #identifier(#inputs) {
            #( #addresses )*
            #( #statements )*
        }
    })
}
